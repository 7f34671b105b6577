"""The policy: a transformers causal LM that computes logprobs over a packed row, sharded by FSDP2.

In: the path of a model, and micro-batches from `trainer.packing`. Out: logprob and entropy of each
trained token, with gradients.

1. `loading`: builds a model on meta, shards it, and lets each rank read or draw its rows.
   `safetensors_folder` reads files, `name_plan` maps their names to the model's.
2. `kernels`: the implementations that a model uses, chosen when it is built: `attention` (over
   packed rows; `varlen` on CUDA) and `matmul` (float32 on a CPU).
3. `sharding`: FSDP2 and activation checkpointing around the decoder blocks; `lora`: adapters.
4. `policy`: the forward pass. `vision` inserts images, `logprobs` applies the head in chunks.

Parameter names are always those of transformers, because files, checkpoints and published weights
use them.
"""
