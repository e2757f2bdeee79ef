"""State dicts of masked models, in and out, and packed files of them."""
