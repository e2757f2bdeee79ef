"""Tables and pictures of masks."""
