"""One-shot pruning: masks from the inputs of layers, and weights that make up for what goes."""
