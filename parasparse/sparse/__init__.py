"""Zeros that pay: in time (`accelerate`) and in bytes (`pack`)."""
