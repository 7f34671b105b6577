"""gsm8k with a tool that checks the answer; README.md has the commands."""
