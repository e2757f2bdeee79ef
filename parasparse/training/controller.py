"""The interface of controllers."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from parasparse.training.history import Update


class Controller(Protocol):
    """Changes the masks of a model while your own training loop runs.

    The callbacks in `parasparse.integrations` accept any object with these attributes and methods.

    Attributes:
        model: the model.
        history: one `Update` for each change of masks.
    """

    model: nn.Module
    history: list[Update]

    def step(self) -> None:
        """Count a step; call it after `optimizer.step()`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, with the first masks by name as "start"."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state; check all of it before changing anything."""

    def unfinished(self) -> str:
        """Say what is missing if training ends now, for a warning; "" if nothing is."""
        return ""

    def close(self) -> None:
        """Remove everything except masks from the model, such as hooks."""
        return
