"""What is logged of an update."""

from parasparse.training.history import Update


def metrics_of(update: Update) -> dict[str, float]:
    """Return the numbers of `update` that speak of all tensors together."""
    return {
        "sparsity/total": update.total,
        "sparsity/churn": update.churn,
        "sparsity/overlap": update.overlap,
    }
