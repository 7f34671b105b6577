"""geometry3k: geometry problems with a diagram, alone or with a tool that checks the answer;
README.md has the commands."""
