"""The quickstart: a small model learns to call a calculator; README.md has the commands."""
