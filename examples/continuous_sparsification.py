r"""Find a sparse ticket of a standard ResNet by Continuous Sparsification, and train it.

    python examples/continuous_sparsification.py --data FOLDER
    python examples/continuous_sparsification.py --data FOLDER --dataset cifar10 --model resnet18 \
        --train-size 0 --epochs 85 --rounds 2 --lr-schedule 56 71 --val-set-size 5000

The network is an ordinary one; its masks come from `ContinuousSparsification`. By default 10,000
digits of MNIST and a small ResNet, which ends in some minutes on two cores; the second line is the
setting of the authors, for a GPU.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from data import cifar10, mnist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import parasparse as ps

mpl.use("Agg")  # pictures go to files: no screen is needed
from matplotlib import pyplot as plt


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = nn.Identity()
        if inputs != outputs:
            self.around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return (self.body(x) + self.around(x)).relu()


def small(channels: int) -> nn.Module:
    """A ResNet of eight layers."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def torchvisions(channels: int) -> nn.Module:
    """ResNet-18 for small images: a stem of stride 1, no pooling after it."""
    model = resnet18(weights=None, num_classes=10)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


BATCH = 128
MODELS: dict[str, Callable[[int], nn.Module]] = {"small": small, "resnet18": torchvisions}


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, device: str) -> float:
    model.eval()
    right = 0
    for x, y in DataLoader(data, batch_size=1000):
        right += int((model(x.to(device)).argmax(1) == y.to(device)).sum())
    model.train()
    return right / len(data)


def train(
    what: str, model: nn.Module, cs: ps.ContinuousSparsification | None,
    data: tuple[TensorDataset, TensorDataset], options: argparse.Namespace,
    after_epoch: Callable[[int, float], None],
) -> None:  # fmt: skip
    """Train for a round; with `cs` and no ticket, its masks as well."""
    soft = cs is not None and not cs.ticket
    weights = list(model.parameters()) if cs is None else cs.weight_parameters()
    sgd = {"lr": options.lr, "momentum": 0.9, "nesterov": True}
    optimizers = [torch.optim.SGD(weights, weight_decay=options.decay, **sgd)]
    if soft:
        optimizers.append(torch.optim.SGD(cs.mask_parameters(), **sgd))
    fit, held_out = data
    for epoch in range(options.epochs):
        if epoch in options.lr_schedule:
            drop = options.lr_drops[options.lr_schedule.index(epoch)]
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] *= drop
        start, total = time.perf_counter(), 0.0
        # A last batch of a few images would be too small for BatchNorm.
        drop_last = len(fit) > BATCH
        loader = DataLoader(fit, batch_size=BATCH, shuffle=True, drop_last=drop_last)
        for x, y in loader:
            for optimizer in optimizers:
                optimizer.zero_grad()
            x, y = x.to(options.device), y.to(options.device)
            loss = nn.functional.cross_entropy(model(x), y)
            total += loss.item()
            if soft:
                loss = loss + options.lmbda * cs.penalty()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        reached = accuracy(model, held_out, options.device)
        note = "" if cs is None else f", T {cs.temperature:.1f}, remaining {cs.remaining():.4f}"
        print(
            f"{what}: epoch {epoch + 1}/{options.epochs}, loss {total / len(loader):.4f}, held-out "
            f"accuracy {reached:.4f}{note}, {time.perf_counter() - start:.1f} s",
            flush=True,
        )
        after_epoch(epoch, reached)
        if soft:
            cs.step()


def find_ticket(
    model: nn.Module, data: tuple[TensorDataset, TensorDataset], options: argparse.Namespace
) -> tuple[ps.ContinuousSparsification, list[tuple[float, float]]]:
    """Search for `rounds` rounds, rewind, train the ticket; return what remained when."""
    rules = {nn.Conv2d: ps.Gate(init=options.mask_initial_value)}
    cs = ps.ContinuousSparsification(
        model, rules, final_temperature=options.final_temp, steps=max(2, options.epochs)
    )
    curve: list[tuple[float, float]] = []

    def note(epoch: int, reached: float) -> None:
        curve.append((cs.remaining(), reached))
        if cs.rounds == 0 and epoch == options.rewind_epoch - 1 and not cs.ticket:
            cs.checkpoint()

    if options.rewind_epoch == 0:
        cs.checkpoint()
    for number in range(options.rounds):
        train(f"round {number + 1}", model, cs, data, options, note)
        if number + 1 < options.rounds:
            cs.prune()
    cs.ticket = True
    cs.rewind()
    print(f"ticket: {cs.remaining():.4f} of the masked weights remain", flush=True)
    train("ticket", model, cs, data, options, note)
    return cs, curve


def picture(curve: list[tuple[float, float]], options: argparse.Namespace, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    epochs = range(1, len(curve) + 1)
    axes.plot(epochs, [remaining for remaining, _ in curve], label="remaining weights")
    axes.plot(epochs, [reached for _, reached in curve], label="held-out accuracy")
    for number in range(1, options.rounds + 1):
        axes.axvline(number * options.epochs + 0.5, color="#bbbbbb", linewidth=1)
    axes.set(xlabel="epoch", ylim=(0, 1.02), title=f"{options.rounds} rounds, then the ticket")
    axes.legend()
    figure.savefig(path, dpi=120)


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="folder of MNIST or CIFAR-10")
    add("--dataset", choices=["mnist", "cifar10"], default="mnist")
    add("--model", choices=MODELS, default="small")
    add("--out", type=Path, default=Path("out"))
    add("--device", default="cpu")
    add("--train-size", type=int, default=10_000, help="training images; 0: all")
    add("--val-set-size", type=int, default=2_000, help="training images held out")
    add("--rounds", type=int, default=2)
    add("--epochs", type=int, default=5, help="of each round, and of the ticket")
    add("--lr", type=float, default=0.1)
    add("--lr-schedule", type=int, nargs="*", default=[], help="epochs at which the rate drops")
    add("--lr-drops", type=float, nargs="*", default=[0.1, 0.1], help="by how much")
    add("--decay", type=float, default=1e-4)
    add("--rewind-epoch", type=int, default=1)
    add("--lmbda", type=float, default=1e-5, help="of the penalty; the authors' is 1e-8")
    add("--final-temp", type=float, default=200.0)
    add("--mask-initial-value", type=float, default=0.0)
    add("--seed", type=int, default=1234)
    options = parser.parse_args(arguments)
    if options.rewind_epoch > options.epochs or min(options.epochs, options.rounds) < 1:
        parser.error("--rewind-epoch must not be after --epochs; --epochs, --rounds must be over 0")
    if len(options.lr_drops) < len(options.lr_schedule):
        parser.error("--lr-drops must have a number for each of --lr-schedule")
    return options


def main(arguments: list[str]) -> None:
    options = options_of(arguments)
    torch.manual_seed(options.seed)
    options.out.mkdir(exist_ok=True, parents=True)
    train_set, test_set = (mnist if options.dataset == "mnist" else cifar10)(options.data)
    order = torch.randperm(len(train_set))
    held_out = TensorDataset(*train_set[order[: options.val_set_size]])
    rest = order[options.val_set_size :]
    fit = TensorDataset(*train_set[rest[: options.train_size or None]])
    model = MODELS[options.model](train_set.tensors[0].shape[1]).to(options.device)
    dense = copy.deepcopy(model)

    train("dense", dense, None, (fit, held_out), options, lambda *_: None)
    cs, curve = find_ticket(model, (fit, held_out), options)
    picture(curve, options, options.out / "continuous_sparsification.png")

    remaining = cs.remaining()
    x = test_set.tensors[0][:100].to(options.device)
    with torch.no_grad():
        before = model.eval()(x)
        ps.squash(model)  # the ticket as a plain network: masks and their scale are folded in
        print(f"squashing changes outputs by {(model(x) - before).abs().max():.1e} at most")
    print(f"dense test accuracy {accuracy(dense, test_set, options.device):.4f}")
    print(
        f"ticket test accuracy {accuracy(model, test_set, options.device):.4f} with "
        f"{remaining:.4f} of the weights of the convolutions"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
