"""The model: one forward pass over the KV cache, for prefill and for decode.

In: tokens and a pass (`attention.py`), which places their keys and values and attends over the
rows. Out: logits. `models.py` loads a model and runs any architecture through transformers' own
code, which calls `attention_hook.py` for attention and `head.py` for logits in full precision.
`fast_decoder.py` runs the common architectures with a fraction of the operators;
`batch_invariance.py` tests whether its results depend on the batch. For vision models `images.py`
turns a request's images into patches and `vision.py` runs the vision tower.
"""
