"""The tensors of a model with all their names, and which of them a rule reaches."""
