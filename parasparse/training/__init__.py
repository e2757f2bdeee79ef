"""Controllers: they change the masks of a model while the user's own loop trains it."""
