"""One module for each library that parasparse plugs into; each imports its library."""
