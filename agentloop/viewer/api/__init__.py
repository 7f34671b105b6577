"""The JSON API of the viewer: runs, episodes, tokens, signals, and events while a run goes on.

`runs.py` finds the runs, `run.py` reads one: its metrics, its trace index, its tokenizer. The
routes are in `router.py`; `parameters.py` checks what they are asked. `conversation.py`,
`tokens.py`, `groups.py` and `metrics.py` make the answers, `events.py` says what is new. An answer
is JSON of plain text, or an image (`images.py`): text of models and tools is never HTML.
"""

from agentloop.viewer.api.router import build_router

__all__ = ["build_router"]
