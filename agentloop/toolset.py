"""The earlier place of `Toolset` and `load_toolset`, kept for code that imports them from here."""

from agentloop.tool.loading import load_toolset
from agentloop.tool.session import Toolset

__all__ = ["Toolset", "load_toolset"]
