"""Formats that write calls in Python syntax, `name(key="value", n=1)`."""
