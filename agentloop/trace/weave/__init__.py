"""The exporter `weave`: each episode as a tree of calls, in Weights & Biases Weave or in a trace
server of one's own.

`exporter` is the class that destinations are made of. `calls` says what an episode is in weave:
names, texts, numbers, errors; `images` opens each image once; `bounds` keeps a call below the size
that weave drops. `client` sends them with weave's own client.
"""

from agentloop.trace.weave.exporter import WeaveExporter

__all__ = ["WeaveExporter"]
