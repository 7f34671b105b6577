"""The HTTP API: SGLang's names, tokens only.

In: requests, as strict JSON (`parsing.py`, `sglang_fields.py`). Out: answers of the router as JSON
or events, and errors by the table in `rollout_server.errors`.

`app.py` puts the ASGI application together. `auth.py` checks the bearer token; `asgi.py` reads
bodies and sends JSON without a framework; `generate.py` is `POST /generate`, and `stream.py`
encodes its answer. `admin.py` adds an administrative route; `weights.py` holds the routes that
publish weights; `metrics.py` is `/metrics`.
"""
