"""The embedded engine: continuous batching over a transformers causal language model.

In comes a `Generation`, out goes a `GenerationResult`. `create.py` builds the engine from a
server's settings. A request's life: `engine.py` moves it from the event loop to the engine's
thread, where it is a `running.py`; `core.py` admits it to a row of the KV cache (`cache/`),
prefills its prompt in chunks and decodes it, one token a step, in the `batch.py` of all others.
`model/` runs the layers, `sampling/` draws the tokens. `weights/` brings in a new policy version
between two steps.
"""
