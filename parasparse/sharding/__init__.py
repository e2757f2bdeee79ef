"""DTensor, FSDP2, and random numbers that are the same on all processes."""
