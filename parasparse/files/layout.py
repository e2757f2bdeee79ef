"""What a new checkpoint holds, and how its tensors are handed over: in pieces."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from parasparse.files.checkpoint import TensorInfo
from parasparse.masks.apply import apply_mask

_PIECE = 1 << 20  # entries
# Takes a tensor by name, as flat pieces, the first entries first.
Put = Callable[[str, Iterable[Tensor]], None]


@dataclass(frozen=True)
class Layout:
    """What a new checkpoint holds.

    Attributes:
        infos: of each tensor, in order.
        ties: a name that is the same tensor as another one -> that one, which is put for both.
        origin: a name that the source has not -> the one of the source that it comes from.
        is_whole: what else the source holds (an optimizer, an index, a configuration) comes along.
    """

    infos: dict[str, TensorInfo]
    ties: dict[str, str] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    is_whole: bool = True


def pieces(tensor: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the entries of `tensor`, masked, in flat pieces: no second tensor of its size.

    `mask` broadcasts to it.
    """
    mask = None if mask is None else mask.expand(tensor.shape).contiguous()
    if tensor.dim() == 0 or tensor.numel() <= _PIECE:
        yield (tensor if mask is None else apply_mask(tensor, mask)).flatten()
        return
    for start, piece in enumerate(tensor.flatten().split(_PIECE)):
        part = None if mask is None else mask.flatten()[start * _PIECE :][: len(piece)]
        yield piece if part is None else apply_mask(piece, part)
