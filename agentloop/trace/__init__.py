"""Traces: what an episode did, kept in the run directory and sent to other programs.

spans.py        the spans of an episode, recorded while it runs
"""

from agentloop.trace.spans import current_traceparent as traceparent
from agentloop.trace.spans import span, trace_headers

__all__ = ["span", "trace_headers", "traceparent"]
