"""The built-in interactions."""
