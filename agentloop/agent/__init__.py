"""Agents: turn a row into scored trajectories.

In: a task, sampling parameters, a seed. Out: trajectories with their outcome.

`loading.py` finds the class that a row's `agent_name` names. `base.py` is its base class;
`single_turn.py` and `tool_agent.py` are the built-in ones. `runner.py` makes the episode, runs the
loop under its limits, closes the tools, checks the token law, calls the reward, and adds one
`Outcome` to every trajectory. A failure is a status, never an exception: one episode cannot end its
batch.
"""
