"""Treatments (the right sides of rules), and the assignment of treatments to tensors."""
