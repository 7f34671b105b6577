"""The trace server: the viewer of runs, and a place that other programs can send traces to.

A request passes `agentloop.web.auth` (who may ask), then `app.py` hands it to a router: `api/`
serves runs as JSON to the page in `static/`, `weave/` is the part of weave's trace server that its
client needs,
`otlp.py` receives OpenTelemetry spans. `received.py` is the store of both, `external.py` shows the
page what is in it. `serving.py` is the process: its port, its token, its end.
"""

from agentloop.viewer.app import create_app

__all__ = ["create_app"]
