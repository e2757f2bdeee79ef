"""Makes torch.ao.pruning accept our data sparsifiers."""

import warnings


def introduce(ours: type) -> None:
    """Register `ours` as a subclass of torch.ao's base class, which its schedulers require."""
    with warnings.catch_warnings():  # importing it sets filters
        try:
            from torch.ao.pruning._experimental import data_sparsifier
        except ImportError:  # this torch has no data sparsifiers
            return
    data_sparsifier.BaseDataSparsifier.register(ours)
