"""A masked checkpoint that a trainer loads before the model has masks."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from parasparse.state import load_state_dict


class Postponed:
    """Keeps masked state dicts that `model` is given to load, until it has the masks.

    Trainers load a checkpoint before they make the optimizer, and controllers, who attach masks,
    need the optimizer. If masks were attached for the load, the optimizer would count parameters
    in another order than when the checkpoint was written, and its state would go to others.

    Args:
        model: what `load_state_dict` is called on.
        strict: whether all that the model has must be in the state dict. What is in the state dict
            must be in the model.
    """

    def __init__(self, model: nn.Module, *, strict: bool) -> None:
        self._model, self._strict = model, strict
        self._state: dict[str, Any] | None = None
        self._hook = model.register_load_state_dict_pre_hook(self._postpone)

    def load(self) -> None:
        """Load what was kept, if anything was; masks that are missing are attached.

        Raises:
            RuntimeError: keys or shapes do not match.
        """
        self.remove()
        state, self._state = self._state, None
        if state is not None:
            result = load_state_dict(self._model, state, strict=self._strict)
            if result.unexpected_keys:
                raise RuntimeError(
                    "the masks of the checkpoint must be those that the controller attaches; the "
                    f"model has no {result.unexpected_keys[:8]}."
                )

    def keep(self) -> None:
        """Keep the state that the model has now, unless one is kept already."""
        if self._state is None:
            self._state = {
                key: copy.deepcopy(value) for key, value in self._model.state_dict().items()
            }

    def is_of(self, model: nn.Module) -> bool:
        """Whether `model` is the one that is looked at."""
        return self._model is model

    def remove(self) -> None:
        """Look at no more state dicts."""
        self._hook.remove()

    def _postpone(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        *_: object,
    ) -> None:
        own = module.state_dict()
        if any("parametrizations" in key.split(".") and key not in own for key in state_dict):
            self._state = dict(state_dict)
            state_dict.clear()
            state_dict.update(own)
