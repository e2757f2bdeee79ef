"""The content of a new checkpoint, and its tensors in pieces."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from parasparse.files.checkpoint import TensorInfo
from parasparse.masks.apply import apply_mask

_PIECE = 1 << 20  # entries
# Takes a tensor by name, as flat pieces in order.
Put = Callable[[str, Iterable[Tensor]], None]


@dataclass(frozen=True)
class Layout:
    """The content of a new checkpoint."""

    infos: dict[str, TensorInfo]  # in order
    ties: dict[str, str] = field(default_factory=dict)  # tied name -> name that is put for both
    origin: dict[str, str] = field(default_factory=dict)  # new name -> name in the source
    is_whole: bool = True  # whether the optimizer, index, configuration, ... are copied
    texts: dict[str, str] = field(default_factory=dict)  # files of a folder: name -> new content


def pieces(tensor: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
    """Yield `tensor`, masked by `mask` (which broadcasts), in flat pieces, to save memory."""
    tensor = tensor.resolve_conj().resolve_neg()  # files hold bytes
    mask = None if mask is None else mask.expand(tensor.shape).contiguous()
    if tensor.dim() == 0 or tensor.numel() <= _PIECE:
        yield (tensor if mask is None else apply_mask(tensor, mask)).flatten()
        return
    for start, piece in enumerate(tensor.flatten().split(_PIECE)):
        part = None if mask is None else mask.flatten()[start * _PIECE :][: len(piece)]
        yield piece if part is None else apply_mask(piece, part)
