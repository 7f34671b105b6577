"""Formats that write a call as one JSON object, which holds its name and its arguments."""
