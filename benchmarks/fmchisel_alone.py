"""The function of fmchisel that prunes by ALPS, without what fmchisel asks for.

    pip install --no-deps fmchisel==0.1.2

fmchisel 0.1.2 asks for torch below 2.8 and transformers below 5, so it cannot stand in the extra
`bench`, which needs torch 2.9. ALPS runs with newer ones. It imports two names of llmcompressor, of
which it uses one, a dtype; both have stand-ins here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch


class ModifierFactory:
    """Where fmchisel lists itself as it is imported."""

    @staticmethod
    def refresh() -> None:
        """Look for modifiers."""


STAND_INS = {
    "llmcompressor.modifiers.factory": {"ModifierFactory": ModifierFactory},
    "llmcompressor.modifiers.obcq.sgpt_sparsify": {"SGPT_PRECISION": torch.float32},
}


def sparsify_weight() -> Callable[..., Any]:
    """Return the function of fmchisel."""
    if not find_spec("llmcompressor"):
        for path, names in STAND_INS.items():
            parts = path.split(".")
            for length in range(1, len(parts) + 1):
                name = ".".join(parts[:length])
                sys.modules.setdefault(name, ModuleType(name))
            vars(sys.modules[path]).update(names)
    from fmchisel.pruning.alps.utils import alps_sparsify

    return alps_sparsify.sparsify_weight
