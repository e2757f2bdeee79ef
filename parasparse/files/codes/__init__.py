"""Codes of packed files: numbers as few bits, packed and unpacked without a loop over them."""
