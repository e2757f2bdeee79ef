"""Removes the channels that masks have made unnecessary: smaller tensors, the same outputs."""
