"""What knows DTensor and FSDP2, and the random numbers that all processes share."""
