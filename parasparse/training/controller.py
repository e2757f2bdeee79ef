"""What a controller is, and what all of them keep: the first masks and the updates since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from torch import nn

from parasparse.training.history import Masks, Update, copied, first_masks_of, saved, update_of


class Controller(Protocol):
    """Changes the masks of a model while the user's loop trains it.

    The callbacks of `parasparse.integrations` take any object that has all of this.

    Attributes:
        model: the model.
        history: an `Update` for each change of masks.
    """

    model: nn.Module
    history: list[Update]

    def step(self) -> None:
        """Count a step; call it after `optimizer.step()`."""

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs, with the first masks by name as "start"."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where another controller stood; check all of `state_dict` before."""

    def close(self) -> None:
        """Let go of the model: another controller takes over, or none."""


class Recorded:
    """A controller with a record; it holds nothing of the model that it would have to let go of."""

    _record: Record

    @property
    def history(self) -> list[Update]:
        """An `Update` for each change of masks."""
        return self._record.updates

    def close(self) -> None:
        """Let go of the model: another controller takes over, or none."""


class Record:
    """The first masks of a controller, and its updates.

    Attributes:
        start: the first masks, by name.
        updates: what has happened since.
    """

    def __init__(self, start: Masks) -> None:
        self.start = copied(start)
        self.updates: list[Update] = []

    def change(self, step: int, before: Masks, after: Masks, missing: int = 0) -> Update:
        """Return the change of masks from `before` to `after`, to be added."""
        return update_of(step, before, after, self.start, missing)

    def state(self) -> dict[str, Any]:
        """Return the entries of a controller's state."""
        return {"history": saved(self.updates), "start": copied(self.start)}

    def loaded(self, state_dict: Mapping[str, Any]) -> Self:
        """Return the record in the state of a controller.

        Raises:
            ValueError: it had other tensors.
        """
        record = type(self)(first_masks_of(state_dict, self.start))
        record.updates = [Update(**update) for update in state_dict["history"]]
        return record
