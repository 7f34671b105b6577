"""The built-in agent loops."""
