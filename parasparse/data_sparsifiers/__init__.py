"""Data sparsifiers: they own the masks of tensors that live in no model."""
