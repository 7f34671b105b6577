"""agentloop: reinforcement learning for language-model agents with tools.

`import agentloop` is cheap on purpose: no torch, no web server. Names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
AGENTLOOP_PACKAGE = "agentloop-rl"

_HOME = {
    "AgentLoop": "agentloop.loop",
    "AgentloopError": "agentloop.errors",
    "ChatRenderer": "agentloop.chat",
    "Episode": "agentloop.episode",
    "EpisodeStatus": "agentloop.types",
    "GenerateClient": "agentloop.client",
    "Interaction": "agentloop.interaction",
    "Message": "agentloop.types",
    "Response": "agentloop.interaction",
    "StopReason": "agentloop.types",
    "Task": "agentloop.types",
    "TokenLedger": "agentloop.ledger",
    "Tool": "agentloop.tool",
    "ToolCall": "agentloop.types",
    "ToolResult": "agentloop.types",
    "Trajectory": "agentloop.types",
    "Turn": "agentloop.types",
}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from agentloop.chat import ChatRenderer as ChatRenderer
    from agentloop.client import GenerateClient as GenerateClient
    from agentloop.episode import Episode as Episode
    from agentloop.errors import AgentloopError as AgentloopError
    from agentloop.interaction import Interaction as Interaction
    from agentloop.interaction import Response as Response
    from agentloop.ledger import TokenLedger as TokenLedger
    from agentloop.loop import AgentLoop as AgentLoop
    from agentloop.tool import Tool as Tool
    from agentloop.types import EpisodeStatus as EpisodeStatus
    from agentloop.types import Message as Message
    from agentloop.types import StopReason as StopReason
    from agentloop.types import Task as Task
    from agentloop.types import ToolCall as ToolCall
    from agentloop.types import ToolResult as ToolResult
    from agentloop.types import Trajectory as Trajectory
    from agentloop.types import Turn as Turn


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'agentloop' has no attribute {name!r}")
