"""Zeros into time: weights that multiply sparsely, in formats chosen by measurement."""
