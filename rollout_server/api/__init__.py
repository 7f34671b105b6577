"""The HTTP API: SGLang's names, tokens only.

In: requests, as strict JSON (`parsing.py`, `sglang_fields.py`). Out: answers of the router as JSON
or events, and errors by the table in `rollout_server.errors`.

`connection.py` limits connections, before a request is read. `app.py` puts the ASGI application
together. `auth.py` checks the bearer token and refuses web pages; `asgi.py` reads bodies and sends
JSON without a framework; `generate.py` is `POST /generate`, `batch.py` takes a request for several
answers apart, and `stream.py` encodes answers. `admin.py` adds an administrative route;
`weights.py` holds the routes that publish weights; `metrics.py` is `/metrics`.
"""
