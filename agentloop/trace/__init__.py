"""Traces: what an episode did, kept in the run directory and sent to other programs.

spans      the spans of an episode, recorded while it runs
record     one trajectory in one step, with what the trainer knows about it
store      the files of a run directory: parquet, images
exporting  the protocol of a destination of spans, and which groups it gets
backlog    what a destination does not have of the store, and how it gets it
sender     the process that sends a run's episodes; `push` does so afterwards
exports    what was sent where
otlp       to OpenTelemetry receivers, under the names of `genai`
index      sqlite beside the store: filter, sort, full-text search
signals    rules that name what looks wrong in a run, with the episodes behind it
export     episodes in the forms that other programs read
"""

from agentloop.trace.spans import current_traceparent as traceparent
from agentloop.trace.spans import span, trace_headers

__all__ = ["span", "trace_headers", "traceparent"]
