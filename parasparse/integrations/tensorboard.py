"""Sparsity and churn for TensorBoard."""

from typing import Any

from parasparse.integrations.metrics import metrics_of


class SparsityWriter:
    """Writes `sparsity/total`, `/churn`, `/overlap` and the sparsity of each tensor.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or any object with its `add_scalar`.
        controller: a controller, such as the `controller` of a callback.

    Examples:
        >>> class Printer:
        ...     def add_scalar(self, tag, value, global_step): print(tag, value, global_step)
        >>> pruner = GradualPruning(nn.Linear(10, 10), 0.5, schedule=schedules.Constant(1), every=9)
        >>> log = SparsityWriter(Printer(), pruner)
        >>> for _ in range(9): pruner.step(); log.step()
        sparsity/total 0.5 9
        sparsity/churn 0.0 9
        sparsity/overlap 1.0 9
        tensors/weight 0.5 9
    """

    def __init__(self, writer: Any, controller: Any) -> None:
        self.writer, self.controller = writer, controller
        self._written = len(controller.history)

    def step(self, global_step: int | None = None) -> None:
        """Write the updates since the last call.

        Args:
            global_step: the step to write them at; None: the step of each update, which starts
                again in each round of `LotteryTicket` and `ContinuousSparsification`.
        """
        for update in self.controller.history[self._written :]:
            step = update.step if global_step is None else global_step
            for tag, value in metrics_of(update).items():
                self.writer.add_scalar(tag, value, step)
            for name, share in update.sparsity.items():
                self.writer.add_scalar(f"tensors/{name}", share, step)
        self._written = len(self.controller.history)
