"""ReTool: mathematics with a Python interpreter, first taught, then learned; README.md has the
commands."""
