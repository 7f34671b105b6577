"""The trainer: takes finished trajectories, makes a new policy version, publishes it to the rollout server."""

AGENTLOOP_PACKAGE = "agentloop-rl"
