"""What the masks of a model amount to, as a table and as pictures."""
