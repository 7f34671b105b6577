"""The twin of retool: a small model that learns which program solves a problem, in minutes."""
