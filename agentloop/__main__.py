"""`python -m agentloop`: the same program as `agentloop`."""

from agentloop.commands.main import main

if __name__ == "__main__":
    main()
