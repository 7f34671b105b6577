"""The embedded engine: continuous batching over a transformers causal language model, in this process.

A request's life: `engine.py` takes it from the event loop into the engine's thread; `core.py` admits it, fills its
row of the KV cache in chunks and decodes it with all others, one token a step, as a `batch.py`. `kv.py` owns the
pools of `rows.py` in the memory of `memory.py`, `prefix.py` finds rows whose tokens a new prompt shares,
`attention.py` attends over them, `sampling.py` draws. `models.py` runs any architecture through transformers' own
code; `fast_decoder.py` runs the common ones with a fraction of the operators. `weights.py` brings in a new policy
version.
"""
