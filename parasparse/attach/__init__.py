"""Hangs a module that masks on one tensor of one module, and takes it off again."""
