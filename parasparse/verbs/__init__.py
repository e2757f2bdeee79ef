"""Functions that change or read a model, one per file."""
