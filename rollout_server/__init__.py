"""The rollout server: tokens in, tokens out. It knows no chat template, no tool, no reward."""

AGENTLOOP_PACKAGE = "agentloop-rl"
