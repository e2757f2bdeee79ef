"""A callback of the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from parasparse.integrations._postponed import Postponed
from parasparse.targets import masked

FILE = "parasparse.pt"


class SparsityCallback(TrainerCallback):
    """Drives a controller: makes it, steps it, and saves it in the Trainer's checkpoints.

    Checkpoints hold the masked model; `trainer.train(resume_from_checkpoint=)` goes on bit for bit.
    After training call `parasparse.squash(model)`, then `model.save_pretrained(...)`: a dense model
    with zeros, which `from_pretrained` reads.

    Args:
        factory: `(model, optimizer) -> controller`, called each time that training starts.
        trainer: needed where several processes train, since only the Trainer has the wrapped model,
            which the controller wants: `trainer.add_callback(SparsityCallback(factory,
            trainer=trainer))`.

    Attributes:
        controller: None until training starts; the last one afterwards, with its `history`.

    Examples:
        >>> from parasparse import rigl
        >>> callback = SparsityCallback(
        ...     lambda model, optimizer: rigl(model, 0.8, optimizer, stop=7_500)
        ... )  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, factory: Callable[..., Any], *, trainer: Trainer | None = None) -> None:
        self.factory, self.trainer = factory, trainer
        self.controller: Any = None
        self._postponed: Postponed | None = None
        if trainer is not None and trainer.model is not None:  # `on_init_end` is over
            self._postponed = Postponed(trainer.model, strict=False)

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Wait for a checkpoint, which is loaded before there is an optimizer."""
        self._postponed = Postponed(given["model"], strict=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Make the controller, and give it back what it was in the checkpoint.

        Raises:
            RuntimeError: several processes train and `trainer` was not given; or the Trainer has
                made a model of its own and goes on from a checkpoint.
            FileNotFoundError: training goes on from a checkpoint that has no state of a controller.
        """
        model = given["model"] if self.trainer is None else self.trainer.model_wrapped
        if args.world_size > 1 and self.trainer is None:
            raise RuntimeError(
                "`trainer` must be given where several processes train: "
                "trainer.add_callback(SparsityCallback(factory, trainer=trainer))."
            )
        saved = _saved(args, state) if state.global_step else None
        if self._postponed is None or not self._postponed.is_of(given["model"]):
            if saved is not None:
                raise RuntimeError(
                    "`Trainer` must be given the model itself to go on from a checkpoint; got a "
                    "`model_init`, whose model was loaded before it could have masks."
                )
            self._postponed = Postponed(given["model"], strict=False)
        if saved is not None:
            self._postponed.keep()
        self.controller = self.factory(model, given["optimizer"])
        self._postponed.load()
        _declare_ties(given["model"])
        if saved is not None:
            self.controller.load_state_dict(saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Step the controller: the optimizer has been stepped."""
        self.controller.step()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the controller's state into the checkpoint."""
        if args.should_save:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            torch.save(self.controller.state_dict(), folder / FILE)


def _declare_ties(model: nn.Module) -> None:
    """Say which tensors of masked ties are duplicates, for `save_pretrained`.

    It refuses shared tensors that no `_tied_weights_keys` names, and looks for these in every
    module (test_a_tied_embedding_is_saved_masked).
    """
    for target in masked(model):
        for part in target.parts:
            for site in part[1:]:
                keys = dict.fromkeys(site.stack().state_dict(), "")
                site.stack()._tied_weights_keys = keys  # type: ignore[assignment]


def _saved(args: Any, state: Any) -> Any:
    """Return the controller's state in the checkpoint that training goes on from."""
    named = [Path(args.resume_from_checkpoint)] if args.resume_from_checkpoint else []
    folders = [*named, Path(args.output_dir, f"checkpoint-{state.global_step}")]
    for folder in folders:
        if (folder / FILE).is_file():
            return torch.load(folder / FILE, weights_only=True)
    raise FileNotFoundError(
        f"the controller's state must lie in {' or '.join(str(f / FILE) for f in folders)}; it is "
        "not there. Where the checkpoint lies elsewhere, name it in TrainingArguments, too: "
        "resume_from_checkpoint=folder."
    )
