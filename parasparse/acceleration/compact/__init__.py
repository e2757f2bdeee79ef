"""Weights stored as their kept entries alone, which train."""
