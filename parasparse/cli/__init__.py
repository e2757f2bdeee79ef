"""The command line: checkpoints looked at, pruned, folded and packed, tensor by tensor."""
