"""A callback of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from parasparse.integrations._metrics import metrics_of
from parasparse.integrations._postponed import Postponed


class Sparsity(Callback):
    """Drives a controller: makes it, steps it, saves it with the checkpoint, and logs its updates.

    Loggers of the Trainer get `sparsity/total`, `sparsity/churn` and `sparsity/overlap` at each
    update. Checkpoints hold the masked model; `Trainer.fit(..., ckpt_path=)` goes on bit for bit,
    and `Trainer.test(..., ckpt_path=)` attaches plain masks to a model that has none. Elsewhere
    `parasparse.load_state_dict(model, checkpoint["state_dict"])` loads it. Strategies that spawn or
    fork ("ddp_spawn", "ddp_notebook") train copies, and Lightning hands back only what the module
    in the main process has names for: not the masked layers. Load a checkpoint there.

    Args:
        factory: `(module, *optimizers) -> controller`, called when fitting starts: the module is
            wrapped where a strategy such as "ddp" does so, and the controller wants it like that.
            A controller whose gates an optimizer has to hold is made in the module's `__init__`,
            and returned here.

    Attributes:
        controller: None until fitting starts; the last one afterwards, with its `history`.

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
        self.factory = factory
        self.controller: Any = None
        self._state: dict[str, Any] | None = None
        self._postponed: Postponed | None = None
        self._seen = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for the checkpoint, which is loaded before there is an optimizer."""
        if self._postponed is not None:
            self._postponed.remove()
        self._postponed = Postponed(pl_module, strict=pl_module.strict_loading)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the controller, and give it back what it was in the checkpoint."""
        assert self._postponed is not None
        if self._state is None and self.controller is not None:
            self._state = self.controller.state_dict()  # a further fit has a further optimizer
        if self._state is not None:
            self._postponed.keep()
        self.controller = self.factory(trainer.model, *trainer.optimizers)
        self._postponed.load()
        if self._state is not None:
            self.controller.load_state_dict(self._state)
            self._state = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from where training starts."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Step the controller if the optimizer was."""
        if trainer.global_step == self._seen or self.controller is None:
            return
        self._seen = trainer.global_step
        before = len(self.controller.history)
        self.controller.step()
        for update in self.controller.history[before:]:
            for logger in trainer.loggers:
                logger.log_metrics(metrics_of(update), step=trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load a checkpoint into a model that is only evaluated."""
        self._load()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load a checkpoint into a model that is only evaluated."""
        self._load()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load a checkpoint into a model that is only evaluated."""
        self._load()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the controller."""
        return {} if self.controller is None else {"controller": self.controller.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is a controller."""
        self._state = state_dict.get("controller")
        if self._state is None:
            self.controller = None

    def _load(self) -> None:
        if self._postponed is not None:
            self._postponed.load()
