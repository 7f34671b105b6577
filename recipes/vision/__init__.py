"""Vision: a small model learns where to look; README.md has the commands."""
