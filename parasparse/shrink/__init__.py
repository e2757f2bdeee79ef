"""Removes the channels that masks have made needless: smaller tensors, the same outputs."""
