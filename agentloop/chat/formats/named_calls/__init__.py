"""Formats that write a call's name first, and then its arguments as one JSON object."""
