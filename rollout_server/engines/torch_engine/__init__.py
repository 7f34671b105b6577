"""The embedded engine: continuous batching over a transformers causal language model.

In: a `Generation`. Out: a `GenerationResult`. `create.py` builds the engine from a server's
settings. A request's life: `engine.py` moves it from the event loop to the engine's thread, where
it is a `running.py`; `core.py` admits it to a row of the KV cache (`cache/`), prefills its prompt
in chunks and decodes it, one token per step, in a batch with the others (`batch.py`). `model/` runs
the layers, `sampling/` draws the tokens. `weights/` loads a new policy version between two steps.
"""
