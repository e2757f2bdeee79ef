"""The command line: inspects, prunes, folds and packs checkpoints, tensor by tensor."""
