"""Data sparsifiers, which own masks of tensors outside models."""
