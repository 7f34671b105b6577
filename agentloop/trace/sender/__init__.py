"""The process that sends the episodes of a run, so that the run itself does nothing of it.

`SpanSender` (`process`) is the run's side: it names each trace file that was written. `serving` is
the other one, which reads those files: `delivery` is its thread for each destination, `indexing`
the one that keeps the index up to date, `memory` its bound.
"""

from agentloop.trace.sender.process import SpanSender

__all__ = ["SpanSender"]
