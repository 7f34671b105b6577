"""A process that converts and sends episodes, so that the agent loops of a run do not wait for it.

`SenderProcess` is the run's side, `serving` the other one, `wire` what goes between them. What the
process does with episodes is a `Sender`: one of OTLP, one of weave.
"""

from agentloop.trace.sender.process import SenderProcess

__all__ = ["SenderProcess"]
