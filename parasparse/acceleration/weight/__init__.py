"""The weight that multiplies sparsely, and what each kind of layer does with it."""
