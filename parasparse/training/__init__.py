"""Controllers, which change the masks of a model during training."""
