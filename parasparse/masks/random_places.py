"""Places drawn at random from tensors that may be far larger than memory."""

import torch
from torch import Tensor

_MOST = 2**62  # randint's numbers below 2**28 have 32 random bits, so some come up more often


def random_positions(
    count: int, numel: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Return `count` different numbers below `numel`, int64 and sorted, each set equally likely.

    Time and memory are proportional to `count`. `generator` must be on `device`; None: torch's.

    Examples:
        >>> random_positions(4, 4, torch.device("cpu")).tolist()
        [0, 1, 2, 3]
        >>> len(random_positions(5, 10**18, torch.device("cpu")))
        5
    """
    if count > numel // 2:  # fewer are left out
        kept = torch.ones(numel, dtype=torch.bool, device=device)
        kept[random_positions(numel - count, numel, device, generator)] = False
        return kept.nonzero().flatten()
    found = torch.empty(0, dtype=torch.int64, device=device)
    while len(found) < count:
        missing = (count - len(found),)
        more = torch.randint(_MOST, missing, generator=generator, device=device).remainder_(numel)
        found = torch.cat([found, more]).unique()
    return found
