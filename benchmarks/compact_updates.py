"""How long does an update of the places take on compact weights, in dense steps?

    python -m benchmarks.compact_updates

MLPs with 95% zeros in the first two weights, one thread. An update drops 30% of the kept entries by
magnitude and grows as many, at random (SET) or by the gradient (RigL), and moves values, indices
and the state of Adam. It happens once in hundreds of steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import parasparse as ps
from benchmarks.timing import after, compare, elapsed, own, show, threads, write
from benchmarks.training import NETWORKS, made, step_of

SPARSITY = 0.95
NAMES = ("MLP 2048, batch 128", "MLP 4096, batch 128")
GROWTH = {"SET": "random", "RigL": "gradient"}


def update_of(network: str, growth: str) -> Callable[[], float]:
    """Return what trains for a step and then returns the milliseconds of an update."""
    build, inputs = NETWORKS[network]
    model, x = made("compact", build, SPARSITY), inputs()
    optimizer = torch.optim.Adam(model.parameters())
    rules = {row.name: SPARSITY for row in ps.summary(model).rows}
    controller = ps.DynamicSparsity(
        model, rules, optimizer, prune="magnitude", growth=growth, redistribution="none",
        prune_rate=0.3, every=1, init="resume",
    )  # fmt: skip

    def train() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), torch.zeros(len(x), 10)).backward()
        optimizer.step()

    return after(train, lambda _: controller.step())


def main() -> None:
    results = {}
    for network in NAMES:
        build, inputs = NETWORKS[network]
        with threads(1):
            step = step_of(made("dense", build, SPARSITY), inputs())
            calls = {"dense step": lambda step=step: elapsed(step)}
            calls |= {name: update_of(network, growth) for name, growth in GROWTH.items()}
            results[network] = compare(calls, repeats=9, clock=own)
        show(network, results[network])
    write("compact_updates", results)


if __name__ == "__main__":
    main()
