"""A callback for the Hugging Face Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parasparse.text import needs

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    error.add_note(needs("parasparse.integrations.transformers", "transformers", "transformers"))
    raise

from parasparse.integrations import resuming
from parasparse.integrations.end_of_training import Sparsest, warn_if_unfinished
from parasparse.targets.reach import masked_targets

FILE = "parasparse.pt"
# Set on the Trainer's state once the optimizer's state is in order, for all callbacks of a run.
_REORDERED = "_parasparse_reordered"


class SparsityCallback(TrainerCallback):
    """Creates a controller, steps it, and saves it in the Trainer's checkpoints.

    Checkpoints contain the masked model: `trainer.train(resume_from_checkpoint=)` resumes bit for
    bit. Another `train()` continues with the masks of the model. After training, call
    `parasparse.squash(model)` and then `model.save_pretrained(...)`, which saves a dense model with
    zeros for `from_pretrained`.

    Whenever an update makes the network sparser, the Trainer forgets its best metric. The best
    checkpoint (`load_best_model_at_end=True`) is therefore the best of those that are as sparse as
    the last one. If there is none, the last weights stay. A warning says if training ends before
    the schedule of the controller.

    Several callbacks can be used together, each for other tensors.

    Args:
        factory: `(model, optimizer) -> controller`, called when training starts.
        trainer: required with several processes, because the controller needs the Trainer's wrapped
            model: `trainer.add_callback(SparsityCallback(factory, trainer=trainer))`.

    Attributes:
        controller: None until training starts; afterwards the last controller.

    Examples:
        >>> callback = SparsityCallback(
        ...     lambda model, optimizer: rigl(model, 0.8, optimizer, stop=7_500)
        ... )  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, factory: Callable[..., Any], *, trainer: Trainer | None = None) -> None:
        self.factory, self.trainer = factory, trainer
        self.controller: Any = None
        self._sparsest: Any = None
        if trainer is not None and trainer.model is not None:  # `on_init_end` is over
            resuming.accept_masks(trainer.model)

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let the model load masks, because checkpoints come before the optimizer."""
        resuming.accept_masks(given["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Create the controller; it continues from the checkpoint or the last training.

        Raises:
            RuntimeError: several processes train without `trainer`, or the controller in the
                checkpoint is of another class or belongs to other masks.
            FileNotFoundError: the checkpoint has no state of a controller.
        """
        if args.world_size > 1 and self.trainer is None:
            raise RuntimeError(
                "`trainer` must be given with several processes: "
                "trainer.add_callback(SparsityCallback(factory, trainer=trainer))."
            )
        model, optimizer = given["model"], given["optimizer"]
        wrapped = model if self.trainer is None else self.trainer.model_wrapped

        def make() -> Any:
            return self.factory(wrapped, optimizer)

        saved = _saved(args, state) if state.global_step else []
        if not saved and resuming.is_of(self.controller, model):
            saved = [resuming.state_of(self.controller, model, ())]
        self.controller = resuming.resumed(model, make, saved) if saved else make()
        self._sparsest = Sparsest(self.controller)
        if saved and saved[0]["order"] and not hasattr(state, _REORDERED):
            resuming.reorder(model, optimizer, saved[0]["order"][0])
            setattr(state, _REORDERED, True)
        _declare_ties(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Step the controller; the optimizer has stepped."""
        self.controller.step()
        if self._sparsest.has_risen():
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Remove the hooks of the controller, and warn if its schedule has not ended."""
        if self.controller is not None:
            self.controller.close()
            warn_if_unfinished(self.controller)
            self._sparsest.warn_if_less(given["model"])

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write the controller's state into the checkpoint."""
        if args.should_save:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            own = resuming.state_of(self.controller, given["model"], [given["optimizer"]])
            # Other callbacks have written theirs; what an earlier run has left has other masks.
            others = [
                each
                for each in _states_in(folder, state.global_step)
                if each["masks"] == own["masks"]
                and resuming.tensors_in(each) != resuming.tensors_in(own)
            ]
            torch.save({"step": state.global_step, "states": [*others, own]}, folder / FILE)


def _declare_ties(model: nn.Module) -> None:
    """Name the duplicate tensors of masked ties for `save_pretrained`.

    It refuses shared tensors that are in no module's `_tied_weights_keys`
    (test_a_tied_embedding_is_saved_masked).
    """
    for target in masked_targets(model):
        for component in target.components:
            for site in component[1:]:
                keys = dict.fromkeys(site.stack().state_dict(), "")
                site.stack()._tied_weights_keys = keys  # type: ignore[assignment]


def _saved(args: Any, state: Any) -> list[dict[str, Any]]:
    """Return the controllers' states in the checkpoint that training resumes from."""
    named = [Path(args.resume_from_checkpoint)] if args.resume_from_checkpoint else []
    folders = [*named, Path(args.output_dir, f"checkpoint-{state.global_step}")]
    for folder in folders:
        states = _states_in(folder, state.global_step)
        if states:
            return states
    raise FileNotFoundError(
        f"the controller's state at step {state.global_step} is not in "
        f"{' or '.join(str(f / FILE) for f in folders)}. If the checkpoint is in another folder, "
        "pass this to TrainingArguments too: resume_from_checkpoint=folder."
    )


def _states_in(folder: Path, step: int) -> list[dict[str, Any]]:
    """Return the states of the controllers in a checkpoint of this step."""
    if not (folder / FILE).is_file():
        return []
    saved: dict[str, Any] = torch.load(folder / FILE, weights_only=True)
    return saved["states"] if saved["step"] == step else []
