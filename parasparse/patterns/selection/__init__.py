"""The highest scores: exact, over any number of tensors, without sorting."""
