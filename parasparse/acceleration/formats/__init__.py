"""Formats that store and multiply a matrix of mostly zeros."""
