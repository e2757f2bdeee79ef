"""Save and load state dicts of masked models, also in packed files."""
