"""What one does to a model, one verb a file."""
