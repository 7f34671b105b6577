"""Tools that agents call.

A tool is a subclass of `agentloop.Tool` or a plain function; a recipe's tools file names it as
`class_name`. Each file or folder here is one tool: `calculator.py` is arithmetic, `image/`
zooms and draws, `search/` asks a retrieval server, `code/` runs programs in a sandbox; the servers
are `search/server` and `sandbox/`. `http/` is what tools in front of a service share: rate limit
and retries. The tool of a single task lives in that recipe's folder (`tool.py`).
"""

AGENTLOOP_PACKAGE = "agentloop-rl"
