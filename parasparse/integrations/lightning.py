"""A callback of Lightning's Trainer."""

from collections.abc import Callable
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
except ImportError as error:
    error.add_note('this needs lightning: pip install "parasparse[lightning]"')
    raise

from parasparse.integrations import resuming
from parasparse.integrations.metrics import metrics_of

# They copy the module before it has masks, and pair its tensors with the copy's by position.
_AVERAGING = tuple(
    getattr(callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(callbacks, name)
)


class Sparsity(Callback):
    """Drives a controller: makes it, steps it, saves it with the checkpoint, and logs its updates.

    `step()` is called once after each batch in which an optimizer stepped. `sparsity/total`,
    `sparsity/churn` and `sparsity/overlap` of the last update are logged like the module's own
    metrics, for loggers and other callbacks. Checkpoints hold the masked model; `fit(ckpt_path=)`
    goes on bit for bit, and `test(ckpt_path=)` attaches their masks to a model that has none.
    Elsewhere `parasparse.load_state_dict(model, checkpoint["state_dict"])` loads them. A further
    `fit` of the same module goes on with its masks; another module starts anew.

    Strategies that spawn or fork ("ddp_spawn", "ddp_notebook") train copies, and Lightning hands
    back only what the module in the main process has names for: not the masked layers. Load a
    checkpoint there.

    Args:
        factory: `(module, *optimizers) -> controller`, called when fitting starts: the module is
            wrapped where a strategy such as "ddp" does so, and the controller wants it like that.
            A controller whose gates an optimizer has to hold is made in the module's `__init__`,
            and returned here.

    Attributes:
        controller: None until fitting starts; the last one afterwards, with its `history`.

    Raises:
        TypeError: `factory` is no function.
        RuntimeError: a callback of the Trainer averages weights; or a checkpoint's controller is
            another, or is of other masks than the checkpoint's model has.

    Examples:
        >>> from parasparse import GradualPruning, schedules
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module load masks: a checkpoint comes before there is an optimizer."""
        averaging = [c for c in trainer.callbacks if isinstance(c, _AVERAGING)]  # type: ignore[attr-defined]
        if averaging and stage == "fit":
            raise RuntimeError(
                f"{type(averaging[0]).__name__} copies the module before it has masks, and would "
                "average dense weights. Average in a loop of your own, with "
                "torch.optim.swa_utils.AveragedModel."
            )
        self._hook = resuming.accept_masks(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take back what `setup` and the controller hung on the module."""
        if self._hook is not None:
            self._hook.remove()
        if self.controller is not None:
            self.controller.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, error: Any) -> None:
        """Take back the same: there is no teardown then."""
        self.teardown(trainer, pl_module, "")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the controller; it goes on where the checkpoint, or the last fit, stood."""

        def make() -> Any:
            return self.factory(trainer.model, *trainer.optimizers)

        state = self._loaded
        if state is None and resuming.is_of(self.controller, pl_module):
            state = resuming.state_of(self.controller, pl_module, ())
        self.controller = make() if state is None else resuming.resumed(pl_module, make, state)
        self._module, self._optimizers = pl_module, trainer.optimizers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the optimizers' states, which have been loaded by now, in order."""
        if self._loaded is not None:
            for optimizer, order in zip(trainer.optimizers, self._loaded["order"], strict=True):
                resuming.reorder(pl_module, optimizer, order)
        self._loaded = None
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Step the controller if an optimizer was."""
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.controller.step()
        if self.controller.history:
            pl_module.log_dict(metrics_of(self.controller.history[-1]))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the controller, what its masks are, and the order of parameters."""
        if self.controller is None or self._module is None:
            return {}
        return resuming.state_of(self.controller, self._module, self._optimizers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is a controller."""
        self._loaded = state_dict or None
        if self._loaded is None:
            self.controller = None
