"""The large tensors of a model that stay dense, and those that should not."""

from collections.abc import Collection
from dataclasses import dataclass

from parasparse.targets.tensors import Target
from parasparse.targets.weights import why_dense

_UNEXPECTED = ("one dimension", "state space")  # dense though nobody would call them so


@dataclass(frozen=True)
class DenseRow:
    """A large tensor without a mask.

    Attributes:
        name: plain name of the tensor.
        shape: its shape.
        reason: why a sparsity alone does not reach it, such as "embedding"; "no rule" if it does.
    """

    name: str
    shape: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {' x '.join(map(str, self.shape))} ({self.reason})"


def dense_rows(targets: list[Target], masked: Collection[str]) -> tuple[DenseRow, ...]:
    """Return the targets, except those called `masked`, with 1% of all entries or more each."""
    reasons = why_dense(targets)
    least = sum(target.shape.numel() for target in targets if not target.is_buffer) / 100
    rows = [
        DenseRow(target.name, tuple(target.shape), reasons.get(target, "no rule"))
        for target in targets
        if target.name not in masked and not target.is_buffer and target.shape.numel() >= least
    ]
    return tuple(row for row in rows if len(row.shape) > 1 or row.reason in _UNEXPECTED)


def unexpectedly_dense(targets: list[Target]) -> list[str]:
    """Return the names of tensors that a sparsity alone misses though they may be weights.

    The list is empty if they hold less than a tenth of the entries of the weights.
    """
    reasons = why_dense(targets)
    missed = [target for target, reason in reasons.items() if reason in _UNEXPECTED]
    reached = sum(target.shape.numel() for target in targets if target not in reasons)
    entries = sum(target.shape.numel() for target in missed)
    return [target.name for target in missed] if entries * 10 > reached + entries else []
