"""Replicas: one engine each, in any process, behind one protocol.

In: a `Generation` or an administrative call from the router. Out: a `GenerationResult`, or an error
whose type tells whether another replica may try.

`base.py` is the protocol. `local.py` is the embedded engine of this process. `http.py` calls
another process through our API and `answer.py` checks its answers; `sglang.py` does the same for a
bare SGLang, where its API differs. `starting/` starts replicas: a child process or the URL of a
running server.
"""
