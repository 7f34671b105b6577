"""The exporter `weave`: each episode as a tree of calls, in Weights & Biases Weave or in a trace
server of one's own.

`exporter` is the class that the run uses. `calls` says what an episode is in weave: names, texts,
numbers, errors; `bounds` keeps a call below the size that weave drops. They go to `process`, which
is another one, where `client` uses weave's client. `images` hands each image over once.
"""

from agentloop.trace.weave.exporter import WeaveExporter

__all__ = ["WeaveExporter"]
