"""Numbers of 0 to 16 bits each, one after the other without gaps."""

import torch
from torch import Tensor

from parasparse.files.codes.cursor import Cursor


def pack_offsets(offsets: Tensor, widths: Tensor) -> Tensor:
    """Return the bytes of `offsets`, each in as many bits as `widths` says, from the lowest bit up.

    Args:
        offsets: 1-D, int32; `0 <= offsets < 2**widths`.
        widths: 1-D, int32, 0 to 16.
    """
    pairs, widths = _in_pairs(offsets, widths)
    starts = widths.cumsum(0)
    total = int(starts[-1]) if starts.numel() else 0
    starts -= widths
    # Pairs that share a word of 32 bits are added up there; the last may reach into the next.
    words = torch.zeros(-(-total // 32) + 1, dtype=torch.int64)
    shifted = pairs.bitwise_left_shift_(starts & 31)
    words.scatter_add_(0, starts.bitwise_right_shift_(5), shifted)
    words[1:] += words[:-1] >> 32
    return words.to(torch.int32).view(torch.uint8)[: -(-total // 8)]


def unpack_offsets(cursor: Cursor, widths: Tensor) -> Tensor:
    """Return the next numbers at `cursor`, int32, each of as many bits as `widths` (int32) says."""
    starts = widths.cumsum(0, dtype=torch.int32)
    data = cursor.take(-(-int(starts[-1]) // 8) if starts.numel() else 0)
    starts -= widths
    halves = torch.cat([data, data.new_zeros(-data.numel() % 2 + 4)]).view(torch.uint16).int()
    words = halves[:-1] | halves[1:] << 16  # 32 bits from every 16th on
    found = words.index_select(0, starts >> 4)
    masks = (1 << widths).sub_(1)
    return found.bitwise_right_shift_(starts.bitwise_and_(15)).bitwise_and_(masks)


def _in_pairs(offsets: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Return each two offsets as one of up to 32 bits, and the widths of these, int64."""
    if len(offsets) % 2:
        offsets, widths = (torch.cat([part, part.new_zeros(1)]) for part in (offsets, widths))
    pairs, both = offsets.contiguous().view(torch.int64), widths.contiguous().view(torch.int64)
    first = both & 0xFFFF
    joined = (pairs >> 32).bitwise_left_shift_(first).bitwise_or_(pairs & 0xFFFF)
    return joined, (both >> 32).add_(first)
