"""Formats that write a turn as framed messages, of which some are calls."""
