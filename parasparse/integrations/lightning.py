"""A callback for Lightning's Trainer."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from parasparse.text import needs

try:
    from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
except ImportError as error:
    error.add_note(needs("parasparse.integrations.lightning", "lightning", "lightning"))
    raise

from parasparse.integrations import resuming
from parasparse.integrations.end_of_training import Sparsest, warn_if_unfinished
from parasparse.integrations.metrics import metrics_of

# They copy the module before it has masks, and match tensors of module and copy by position.
_AVERAGING = tuple(
    getattr(callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(callbacks, name)
)


class Sparsity(Callback):
    """Creates a controller, steps it, saves it in checkpoints, and logs its updates.

    `step()` is called after each batch in which an optimizer stepped. `sparsity/total`,
    `sparsity/churn` and `sparsity/overlap` of the last update are logged like the module's own
    metrics. Checkpoints contain the masked model: `fit(ckpt_path=)` resumes bit for bit, and
    `test(ckpt_path=)` attaches their masks to a dense model. Outside a Trainer, use
    `parasparse.load_state_dict(model, checkpoint["state_dict"])`. Another `fit` of the same module
    continues with its masks; a different module gets a new controller.

    Whenever an update makes the network sparser, checkpoints that a `ModelCheckpoint` has saved so
    far count as its worst, so its best one is as sparse as the last. A warning says if there is
    none, and if training ends before the schedule of the controller.

    Several callbacks can be used together, each for other tensors. The second one logs
    `sparsity-1/total` and so on. To resume, pass them in the same order.

    Strategies that spawn or fork ("ddp_spawn", "ddp_notebook") train copies, and Lightning does not
    return the masked layers to the main process. Load a checkpoint there.

    Args:
        factory: `(module, *optimizers) -> controller`, called when fitting starts. Controllers take
            one of the optimizers, or several: `lambda module, *optimizers: ...`. Strategies such
            as "ddp" pass the wrapped module, which the controller needs. If an optimizer must hold
            the controller's gates, create the controller in the module's `__init__` and return it
            here.

    Attributes:
        controller: None until fitting starts; afterwards the last controller.

    Raises:
        TypeError: `factory` is not a function.
        RuntimeError: a callback of the Trainer averages weights, or the controller in a checkpoint
            is of another class or belongs to other masks.

    Examples:
        >>> to_90_percent = schedules.Cubic(0.0, 1.0, stop=2_000)
        >>> callback = Sparsity(
        ...     lambda module, optimizer: GradualPruning(
        ...         module, 0.9, optimizer, schedule=to_90_percent, every=100
        ...     )
        ... )  # Trainer(callbacks=[callback])
    """

    def __init__(self, factory: Callable[..., Any]) -> None:
        if not callable(factory):
            raise TypeError(
                "`factory` must be a function (module, *optimizers) -> controller; got "
                f"{type(factory).__name__}."
            )
        self.factory = factory
        self.controller: Any = None
        self._loaded: dict[str, Any] | None = None
        self._optimizers: list[Any] = []
        self._module: LightningModule | None = None
        self._hook: Any = None
        self._seen = 0
        self._position: int | None = None
        self._sparsest: Any = None
        self._outdated: set[str] = set()

    @property
    def state_key(self) -> str:
        """Return the key of its state in checkpoints: by its position among those of a Trainer."""
        kind = type(self).__qualname__
        # A Trainer wants different keys before `setup`, where callbacks learn of each other.
        return f"{kind}-{id(self)}" if self._position is None else self._numbered(kind)

    def _numbered(self, name: str) -> str:
        return f"{name}-{self._position}" if self._position else name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module load masks, because checkpoints come before optimizers."""
        averaging = [c for c in trainer.callbacks if isinstance(c, _AVERAGING)]  # type: ignore[attr-defined]
        if averaging and stage == "fit":
            raise RuntimeError(
                f"{type(averaging[0]).__name__} copies the module before it has masks, and would "
                "average dense weights. Use torch.optim.swa_utils.AveragedModel in your own "
                "training loop."
            )
        self._position = _all_of(trainer).index(self)
        self._hook = resuming.accept_masks(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks of `setup` and of the controller."""
        if self._hook is not None:
            self._hook.remove()
        if self.controller is not None:
            self.controller.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, error: Any) -> None:
        """Remove the same hooks, because Lightning skips `teardown`."""
        self.teardown(trainer, pl_module, "")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the controller; it continues from the checkpoint or the last fit."""

        def make() -> Any:
            return self.factory(trainer.model, *trainer.optimizers)

        state = self._loaded
        if state is None and resuming.is_of(self.controller, pl_module):
            state = resuming.state_of(self.controller, pl_module, ())
        self.controller = make() if state is None else resuming.resumed(pl_module, make, [state])
        self._sparsest, self._outdated = Sparsest(self.controller), set()
        self._module, self._optimizers = pl_module, trainer.optimizers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reorder the optimizers' states, which are loaded by now; the first one does for all."""
        loaded = [each for each in _all_of(trainer) if each._loaded is not None]
        orders = loaded[0]._loaded["order"] if loaded else []  # type: ignore[index]
        for optimizer, order in zip(trainer.optimizers, orders, strict=bool(loaded)):
            resuming.reorder(pl_module, optimizer, order)
        for each in loaded:
            each._loaded = None
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Step the controller if an optimizer has stepped."""
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.controller.step()
        if self._sparsest.has_risen():
            for checkpoints in _with_best(trainer):
                self._outdated |= checkpoints.best_k_models.keys()
                _make_worst(checkpoints)
        if self.controller.history:
            name = self._numbered("sparsity")
            metrics = metrics_of(self.controller.history[-1])
            pl_module.log_dict({key.replace("sparsity", name): metrics[key] for key in metrics})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the schedule of the controller has not ended."""
        warn_if_unfinished(self.controller)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the best checkpoint is less sparse than the last one."""
        best = [checkpoints.best_model_path for checkpoints in _with_best(trainer)]
        for path in self._outdated.intersection(best):
            warnings.warn(
                f"the best checkpoint, {path}, is less sparse than the model. Validate and save "
                "after the last update of the masks.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the controller, digests of its masks, and parameter names."""
        if self.controller is None or self._module is None:
            return {}
        return resuming.state_of(self.controller, self._module, self._optimizers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the controller is created."""
        self._loaded = state_dict or None
        if self._loaded is None:
            self.controller = None


def _all_of(trainer: Trainer) -> list[Sparsity]:
    return [each for each in trainer.callbacks if isinstance(each, Sparsity)]  # type: ignore[attr-defined]


def _with_best(trainer: Trainer) -> list[callbacks.ModelCheckpoint]:
    """Return the callbacks that save the best checkpoints by a metric."""
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, callbacks.ModelCheckpoint)]
    return [each for each in found if each.monitor is not None]


def _make_worst(checkpoints: callbacks.ModelCheckpoint) -> None:
    """Let any later checkpoint be better than those so far, which are still counted."""
    worst = torch.tensor(math.inf if checkpoints.mode == "min" else -math.inf)
    checkpoints.best_k_models = dict.fromkeys(checkpoints.best_k_models, worst)
    if checkpoints.best_k_models:
        checkpoints.best_model_score = checkpoints.kth_value = worst
