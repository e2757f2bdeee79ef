"""The tensors of a model with all their names, and the rules that reach them."""
