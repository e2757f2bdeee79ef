"""How torch.ao.pruning comes to take our data sparsifiers for its own."""

import warnings


def introduce(ours: type) -> None:
    """Let its schedulers, which ask for an instance of its base class, take those of `ours`."""
    with warnings.catch_warnings():  # it sets filters when it is imported
        try:
            from torch.ao.pruning._experimental import data_sparsifier
        except ImportError:  # a torch that has none
            return
    data_sparsifier.BaseDataSparsifier.register(ours)
