"""Formats that write each argument as bare text between tags; the tool's schema gives its type."""
