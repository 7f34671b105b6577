"""agentloop: reinforcement learning for language-model agents with tools.

The life of a row, and where to look:

* `config` reads the recipe, `data` turns rows into tasks, `registry` turns names into objects;
* `agent` runs one coroutine per sample: its loop talks to an `episode`, which owns the conversation
  and its tokens;
* `chat` renders messages into token ids and parses what the model sampled;
* `client` sends ids to the rollout server (`wire` is the protocol) and returns ids, logprobs and
  versions;
* `tool`, `interaction` and `reward` answer and score; `runtime` keeps blocking code away from the
  event loop;
* the episode becomes trajectories (`types`), which `trainer` trains on and `report` shows;
* `weights` is the way of new weights to the server; `model_folder` reads models, `files` writes
  files whole.

`import agentloop` is cheap: no torch, no web server. Names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
AGENTLOOP_PACKAGE = "agentloop-rl"

_HOME = {
    "AgentLoop": "agentloop.agent.base",
    "AgentloopError": "agentloop.errors",
    "ChatRenderer": "agentloop.chat",
    "Episode": "agentloop.episode.episode",
    "EpisodeStatus": "agentloop.types",
    "GenerateClient": "agentloop.client.client",
    "Interaction": "agentloop.interaction.base",
    "Message": "agentloop.types",
    "Response": "agentloop.interaction.base",
    "StopReason": "agentloop.types",
    "Task": "agentloop.types",
    "TokenLedger": "agentloop.episode.ledger",
    "Tool": "agentloop.tool.base",
    "ToolCall": "agentloop.types",
    "ToolResult": "agentloop.types",
    "Trajectory": "agentloop.types",
    "Turn": "agentloop.types",
    "rollout": "agentloop.agent.rollout",
}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from agentloop.agent.base import AgentLoop as AgentLoop
    from agentloop.agent.rollout import rollout as rollout
    from agentloop.chat import ChatRenderer as ChatRenderer
    from agentloop.client.client import GenerateClient as GenerateClient
    from agentloop.episode.episode import Episode as Episode
    from agentloop.episode.ledger import TokenLedger as TokenLedger
    from agentloop.errors import AgentloopError as AgentloopError
    from agentloop.interaction.base import Interaction as Interaction
    from agentloop.interaction.base import Response as Response
    from agentloop.tool.base import Tool as Tool
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


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
