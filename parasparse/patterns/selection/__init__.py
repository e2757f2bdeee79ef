"""Exact selection of the highest scores of any number of tensors, without sorting."""
