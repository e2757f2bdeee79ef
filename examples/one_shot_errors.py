"""How far the outputs of one layer move when it is pruned in one shot, by each update of `OneShot`.

    python examples/one_shot_errors.py

Prints the relative squared change of the outputs of a linear layer with random weights, 256
correlated inputs and 64 outputs, measured on the 2,000 samples that the statistics come from. Takes
about 20 seconds on one core.
"""

import torch
from torch import nn

import parasparse as ps

COLUMNS = {
    "50%": {"sparsity": 0.5},
    "70%": {"sparsity": 0.7},
    "90%": {"sparsity": 0.9},
    "2:4": {"pattern": ps.patterns.n_of_m(2, 4)},
}
ROWS = {
    "magnitude": {"update": "none", "score": ps.scores.magnitude},
    "Wanda": {"update": "none", "score": "wanda"},
    "RIA": {"update": "none", "score": "ria"},
    "SparseGPT": {"update": "obs"},
    "least squares on Wanda's mask": {"update": "least_squares", "score": "wanda"},
    "the same with 20 swaps": {"update": "least_squares", "score": "wanda", "swaps": 20},
    "ADMM": {"update": "admm"},
    "ADMM with 20 swaps": {"update": "admm", "swaps": 20},
}


def errors(outputs: int = 64, inputs: int = 256, samples: int = 2000) -> dict[str, list[float]]:
    """Return the errors by row, one for each column."""
    torch.manual_seed(0)
    mixing = torch.randn(inputs, inputs) / inputs**0.5 + 0.3 * torch.eye(inputs)
    x = torch.randn(samples, inputs) @ mixing * torch.randn(inputs).mul(0.5).exp()
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight)
    with torch.no_grad(), ps.scores.collect(layer, grams=True) as statistics:
        for batch in x.split(250):
            layer(batch)
    found: dict[str, list[float]] = {}
    for row, method in ROWS.items():
        history: list[ps.OneShotRow] = []
        for column in COLUMNS.values():
            prune = ps.OneShot(statistics=statistics, history=history, **method, **column)
            prune({"weight": layer.weight})
        found[row] = [each.error for each in history]
    return found


def main() -> None:
    """Print the table."""
    print(f"| | {' | '.join(COLUMNS)} |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for row, values in errors().items():
        print(f"| {row} | {' | '.join(f'{value:.4f}' for value in values)} |")


if __name__ == "__main__":
    main()
