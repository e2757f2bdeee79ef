"""Learn which weights are relevant, drop the others, fine-tune: real and complex networks.

    python examples/relevance.py --data FOLDER

A network trains with gates beside its weights (variational dropout, or L0), their penalty rises,
irrelevant weights are masked, the masks go to a plain copy of the network, and that is fine-tuned
and squashed. FOLDER holds MNIST; some minutes on two cores.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from data import mnist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import parasparse as ps


def real() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


class Complex(nn.Module):
    """Three complex layers on the low frequencies of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(196, 100, dtype=torch.complex64)
        self.second = nn.Linear(100, 100, dtype=torch.complex64)
        self.last = nn.Linear(100, 10, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        z = torch.fft.fft2(x, norm="ortho").roll((7, 7), (-2, -1))[..., :14, :14].flatten(1)
        for layer in (self.first, self.second):
            z = layer(z)
            z = torch.complex(z.real.relu(), z.imag.relu())
        return self.last(z).real


BATCH = 100
GATES = {
    "variational dropout": ps.Gate(ps.gates.variational_dropout, init=-8.0),
    "L0": ps.Gate(ps.gates.hard_concrete, init=2.0),
}


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def train(
    what: str,
    model: nn.Module,
    data: tuple[TensorDataset, TensorDataset],
    epochs: int,
    weight: float,
) -> None:
    """Minimise the loss plus `weight` times the penalty of the gates, which rises to that."""
    gates = [p for name, p in model.named_parameters() if name.endswith(".logits")]
    plain = [p for name, p in model.named_parameters() if not name.endswith(".logits")]
    groups = [{"params": plain, "lr": 2e-3}, {"params": gates, "lr": 3e-2}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    for epoch in range(epochs):
        model.train()
        start, total = time.perf_counter(), 0.0
        rising = weight * min(1.0, (epoch + 1) / (0.5 * epochs))
        # A last batch of a few images would be too small for BatchNorm.
        drop_last = len(data[0]) > BATCH
        loader = DataLoader(data[0], batch_size=BATCH, shuffle=True, drop_last=drop_last)
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            total += loss.item()
            if gates:
                loss = loss + rising * ps.penalty(model)
            loss.backward()
            optimizer.step()
        print(
            f"  {what}: epoch {epoch + 1}/{epochs}, loss {total / len(loader):.4f}, test accuracy "
            f"{accuracy(model, data[1]):.4f}, {time.perf_counter() - start:.1f} s",
            flush=True,
        )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of MNIST")
    parser.add_argument("--train-size", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    train_set, test_set = mnist(options.data)
    order = torch.randperm(len(train_set))[: options.train_size]
    data = TensorDataset(*train_set[order]), test_set
    lines = []
    for kind, build in (("real", real), ("complex", Complex)):
        dense = build()
        first = copy.deepcopy(dense)
        print(f"{kind}: dense")
        train("dense", dense, data, options.epochs, 0.0)
        for name, gate in GATES.items():
            print(f"{kind}: {name}")
            gated = ps.sparsify(copy.deepcopy(first), gate)
            train(name, gated, data, options.epochs, 1 / len(data[0]))
            ps.binarize(gated)
            masks = dict(ps.named_masks(gated))

            # The masks go to a plain network with the weights that were learned.
            tuned = build()
            tuned.load_state_dict(ps.dense_state_dict(gated))
            ps.sparsify(tuned, masks)
            pruned = accuracy(tuned, data[1])
            train("fine-tuned", tuned, data, max(1, options.epochs // 3), 0.0)
            zeros = ps.summary(tuned).masked.sparsity
            ps.squash(tuned)
            lines.append(
                f"{kind:<8} {name:<20} sparsity {zeros:.3f}, test accuracy: dense "
                f"{accuracy(dense, data[1]):.4f}, masked {pruned:.4f}, fine-tuned "
                f"{accuracy(tuned, data[1]):.4f}"
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
