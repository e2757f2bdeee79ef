"""The weight that multiplies sparsely, and the layers that use it."""
