"""Weights that multiply sparsely, in formats chosen by measurement."""
