"""Tools that agents call, and the servers behind two of them."""

AGENTLOOP_PACKAGE = "agentloop-rl"
