"""Replicas: one engine each, in any process, behind one protocol.

In: a `Generation` or an administrative call from the router. Out: a `GenerationResult`, or an error
whose type tells whether another replica may try.

`base.py` is the protocol. `local.py` is the embedded engine of this process. `http.py` speaks our
dialect to another process and `answer.py` checks what it answers; `sglang.py` is the same for a
bare SGLang, where its dialect differs. `starting/` is where replicas come from: a child process or
the URL of a running server.
"""
