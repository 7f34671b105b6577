"""The trainer: trajectories come in, a new policy version is published to the rollout server."""

AGENTLOOP_PACKAGE = "agentloop-rl"
