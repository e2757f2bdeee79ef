"""The right sides of rules, and which tensor gets what, checked before anything changes."""
