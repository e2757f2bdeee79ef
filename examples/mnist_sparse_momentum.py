"""Train LeNet-300-100 or Caffe's LeNet-5 on MNIST with 5 % of the weights, by sparse momentum.

    python examples/mnist_sparse_momentum.py --data FOLDER --model lenet5 --iters 3 --dense
    python examples/mnist_sparse_momentum.py --summarize out/lenet5-*.log

FOLDER holds the four idx files, gzipped or not, or is where torchvision puts them. Moves are named,
or `module:function`; the tutorial's own are in sparse_learning_moves.py. The defaults are those of
sparse_learning, but for the number of epochs, which is 100 there. An epoch of LeNet-5 takes some 20
seconds on two cores.
"""

import argparse
import copy
import importlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from data import mnist
from lenets import MODELS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import parasparse as ps
from parasparse.schedules import Constant, Cosine, Linear

mpl.use("Agg")  # pictures go to files: no screen is needed
from matplotlib import pyplot as plt

MOVES = {
    "variance": "sparse_learning_moves:variance_redistribution",
    "magnitude_variance": "sparse_learning_moves:magnitude_variance_pruning",
}
SCHEDULES = {"cosine": Cosine, "linear": Linear}


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Return accuracy and mean loss."""
    model.eval()
    right, loss = 0, 0.0
    for x, y in DataLoader(data, batch_size=1000):
        out = model(x)
        right += int((out.argmax(1) == y).sum())
        loss += nn.functional.cross_entropy(out, y, reduction="sum").item()
    model.train()
    return right / len(data), loss / len(data)


def move(name: str) -> str | Callable[..., object]:
    """Return the function that `module:function` names, or the name of a built-in move."""
    name = MOVES.get(name, name)
    if ":" not in name:
        return name
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def optimizer_for(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    if options.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), options.lr, weight_decay=options.l2)
    return torch.optim.SGD(
        model.parameters(), options.lr, momentum=options.momentum, nesterov=True,
        weight_decay=options.l2,
    )  # fmt: skip


def controller_for(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, options: argparse.Namespace
) -> ps.DynamicSparsity:
    decay = SCHEDULES.get(options.decay_schedule)
    first = options.prune_rate
    rate = Constant(first) if decay is None else decay(first, 0.0, stop=steps)
    return ps.DynamicSparsity(
        model, 1 - options.density, optimizer, prune=move(options.prune),
        growth=move(options.growth), redistribution=move(options.redistribution), prune_rate=rate,
        every=options.every, init=options.init,
    )  # fmt: skip


def train(
    model: nn.Module, data: tuple[TensorDataset, TensorDataset], options: argparse.Namespace,
    log: Callable[[str], None], *, sparse: bool,
) -> dict[str, list]:  # fmt: skip
    """Train, and return accuracy and sparsity by layer, epoch by epoch."""
    fit, held_out = data
    drop_last = len(fit) > options.batch_size  # a small last batch is a wild step
    loader = DataLoader(fit, options.batch_size, shuffle=True, drop_last=drop_last)
    steps = len(loader) * options.epochs
    optimizer = optimizer_for(model, options)
    drops = [round(steps * share) for share in options.lr_drops]
    rates = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    dst = controller_for(model, optimizer, steps, options) if sparse else None
    curves: dict[str, list] = {"accuracy": [], "sparsity": []}
    for epoch in range(1, options.epochs + 1):
        start, total = time.perf_counter(), 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            rates.step()
            if dst is not None:
                dst.step()
            total += loss.item()
        if dst is not None and options.every is None and epoch < options.epochs:
            dst.at_end_of_epoch()
        accuracy, _ = evaluate(model, held_out)
        curves["accuracy"].append(accuracy)
        line = f"epoch {epoch}/{options.epochs}: train loss {total / len(loader):.4f}, "
        line += f"held-out accuracy {accuracy:.4f}, {time.perf_counter() - start:.1f} s"
        if dst is not None:
            table = ps.summary(model)
            curves["sparsity"].append({row.name: row.sparsity for row in table.rows})
            line += f", sparsity {table.masked.sparsity:.4f}"
        log(line)
        if dst is not None and dst.history and options.verbose:
            log(str(dst.history[-1]))
    return curves


def run(seed: int, sets: tuple[TensorDataset, TensorDataset], options: argparse.Namespace) -> dict:
    """Train one network, and the same one dense where asked; return what was reached."""
    torch.manual_seed(seed)
    train_set, test_set = sets
    cut = round(len(train_set) * (1 - options.valid_split))
    parts = (slice(cut), slice(cut, None))
    fit, held_out = (TensorDataset(*train_set[part]) for part in parts)
    held_out = held_out if len(held_out) else test_set
    model = MODELS[options.model]()
    kinds = {"sparse": model} | ({"dense": copy.deepcopy(model)} if options.dense else {})
    reached: dict[str, dict] = {}
    for kind, network in kinds.items():
        path = options.out / f"{options.model}-{kind}-seed{seed}.log"
        with path.open("w") as file:

            def log(line: str, kind: str = kind, file=file) -> None:
                print(f"seed {seed} {kind} {line}", flush=True)
                print(line, file=file, flush=True)

            log(json.dumps({k: str(v) for k, v in vars(options).items()}))
            curves = train(network, (fit, held_out), options, log, sparse=kind == "sparse")
            accuracy, loss = evaluate(network, test_set)
            if kind == "sparse":
                kept = 1 - ps.summary(network).masked.sparsity
                log(f"final density {kept:.4f}")
            log(f"test: accuracy {accuracy:.4f}, loss {loss:.4f}")
        reached[kind] = {"accuracy": accuracy, "loss": loss, "curves": curves}
    picture(reached, options.out / f"{options.model}-seed{seed}.png", options.model)
    return reached


def picture(reached: dict[str, dict], path: Path, title: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, found in reached.items():
        accuracy = found["curves"]["accuracy"]
        left.plot(range(1, len(accuracy) + 1), accuracy, label=kind)
    left.set(xlabel="epoch", ylabel="held-out accuracy", title=title)
    left.legend()
    by_epoch = reached["sparse"]["curves"]["sparsity"]
    for name in by_epoch[0]:
        right.plot(range(1, len(by_epoch) + 1), [each[name] for each in by_epoch], label=name)
    right.set(xlabel="epoch", ylabel="sparsity", title="sparsity by layer")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def summary(what: str, values: list[float]) -> str:
    """Return median, mean, standard error and the 95 % confidence interval of the mean."""
    n, mean = len(values), statistics.mean(values)
    error = statistics.stdev(values) / n**0.5 if n > 1 else float("nan")
    low, high = mean - 1.96 * error, mean + 1.96 * error
    return (
        f"{what} Median: {statistics.median(values):.5f}, Mean: {mean:.5f}, "
        f"Standard Error: {error:.5f}, Sample size: {n}, 95% CI: ({low:.5f},{high:.5f})"
    )


def summarize(results: list[tuple[float, float]]) -> str:
    """Return the summary of (accuracy, loss) over several runs."""
    accuracy, loss = ([result[i] for result in results] for i in (0, 1))
    return "\n".join(
        [
            summary("Accuracy.", accuracy),
            summary("Error.   ", [1 - value for value in accuracy]),
            summary("Loss.    ", loss),
        ]
    )


def summarize_logs(paths: list[Path]) -> str:
    """Return the summary over the logs of several runs; each ends with its test result."""
    results = []
    for path in paths:
        found = re.findall(r"^test: accuracy (\S+), loss (\S+)$", path.read_text(), re.MULTILINE)
        if not found:
            raise SystemExit(f"{path} must be the log of a run that ended; it has no test result")
        results += [(float(accuracy), float(loss)) for accuracy, loss in found]
    return summarize(results)


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="folder of the idx files")
    add("--out", type=Path, default=Path("out"), help="folder of logs and pictures")
    add("--model", choices=MODELS, default="lenet5")
    add("--density", type=float, default=0.05, help="share of the weights that are kept")
    add("--prune", default="magnitude")
    add("--growth", default="momentum")
    add("--redistribution", default="momentum")
    add("--prune-rate", type=float, default=0.5)
    add("--decay-schedule", choices=[*SCHEDULES, "constant"], default="cosine")
    add("--every", type=int, help="steps from update to update; else at the end of each epoch")
    add("--init", choices=["constant", "linear", "erk"], default="constant")
    add("--optimizer", choices=["sgd", "adam"], default="sgd")
    add("--lr", type=float, default=0.1)
    add("--lr-drops", type=float, nargs="*", default=[0.463, 0.926],
        help="shares of the training")  # fmt: skip
    add("--momentum", type=float, default=0.9)
    add("--l2", type=float, default=5e-4, help="weight decay")
    add("--epochs", type=int, default=20)
    add("--batch-size", type=int, default=100)
    add("--valid-split", type=float, default=0.1,
        help="share of the training images held out: the last of the file")  # fmt: skip
    add("--iters", type=int, default=1, help="runs, each with the next seed")
    add("--seed", type=int, default=17)
    add("--dense", action="store_true", help="train the dense network as well, the same way")
    add("--verbose", action="store_true", help="log what each update changed")
    add("--summarize", type=Path, nargs="+", metavar="LOG", help="only summarize these logs")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.iters < 1:
        parser.error("--epochs and --iters must be 1 or more")
    return options


def main(arguments: list[str]) -> None:
    options = options_of(arguments)
    sys.path.insert(0, str(Path.cwd()))  # for module:function
    if options.summarize:
        print(summarize_logs(options.summarize))
        return
    options.out.mkdir(exist_ok=True, parents=True)
    sets = mnist(options.data)
    runs = [run(options.seed + i, sets, options) for i in range(options.iters)]
    for kind in runs[0]:
        print(f"{kind}, {options.model}, {options.epochs} epochs")
        print(summarize([(found[kind]["accuracy"], found[kind]["loss"]) for found in runs]))


if __name__ == "__main__":
    main(sys.argv[1:])
