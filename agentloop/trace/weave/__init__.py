"""The exporter `weave`: each episode as a tree of calls, in Weights & Biases Weave or in a trace
server of one's own.

`calls` says what an episode is in weave: names, texts, numbers, errors. `bounds` keeps a call below
the size that weave drops. `images` gives each image once. `client` talks to the server, with
weave's own client. `exporter` is the class that the run uses.
"""

from agentloop.trace.weave.exporter import WeaveExporter

__all__ = ["WeaveExporter"]
