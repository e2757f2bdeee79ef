"""One module per library that parasparse works with; each imports its library."""
