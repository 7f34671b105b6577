"""The part of weave's trace server that its client needs: tracing, queries, objects, feedback.

`routes.py` names the paths. `account.py` is what the client asks first; `calls.py` writes calls and
`reading.py` reads them; `objects.py`, `tables.py`, `files.py` and `feedback.py` do both. `refs.py`
follows weave's refs, `queries.py` turns its query language into SQL. `values.py` has the checks of
fields and the digests that they share.
"""

from agentloop.viewer.weave.routes import HANDLERS, build_router

__all__ = ["HANDLERS", "build_router"]
