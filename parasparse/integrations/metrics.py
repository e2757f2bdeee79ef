"""Metrics of an update for loggers."""

from parasparse.training.history import Update


def metrics_of(update: Update) -> dict[str, float]:
    """Return the metrics of `update` over all tensors."""
    return {
        "sparsity/total": update.total,
        "sparsity/churn": update.churn,
        "sparsity/overlap": update.overlap,
    }
