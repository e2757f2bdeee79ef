"""What `prune_blocks` did to a block."""

from __future__ import annotations

from dataclasses import dataclass

from parasparse.oneshot.report import OneShotRow


@dataclass(frozen=True)
class BlockReport:
    """What `prune_blocks` did to a block; prints as a line.

    Attributes:
        name: name of the block.
        number, blocks: it is block `number`, from 1, of `blocks`.
        kept: number of kept entries of each tensor that rules reach, by name.
        numel: number of entries of each.
        by_magnitude: the tensors that had no inputs and are pruned by magnitude.
        rows: what `OneShot` says of each tensor that it pruned.
    """

    name: str
    number: int
    blocks: int
    kept: dict[str, int]
    numel: dict[str, int]
    by_magnitude: tuple[str, ...] = ()
    rows: tuple[OneShotRow, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of zeros of all these tensors."""
        total = sum(self.numel.values())
        return 1 - sum(self.kept.values()) / total if total else 0.0

    def __str__(self) -> str:
        line = f"{self.number}/{self.blocks} {self.name}: {len(self.kept)} tensors"
        line += f", sparsity {self.sparsity:.2%}" if self.kept else ""
        if self.rows:
            line += f", mean error {sum(row.error for row in self.rows) / len(self.rows):.4f}"
        more = len(self.by_magnitude)
        return line + (f", {more} of them by magnitude, without inputs" if more else "")
