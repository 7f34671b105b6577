"""Transfer of weights: the code that trainer and engines share. Only `group` imports torch.

In: named tensors of a policy version. Out: the same bytes at an engine, with a checksum.

1. `layout`: where each tensor lies in a safetensors file, which tensors are broadcast together, and
   the checksum of a set of tensors.
2. `shared`: a file in shared memory that engines read while the trainer writes it, with a record of
   the progress.
3. `group`: the process group in which rank 0 of the trainer broadcasts to the engines.

The trainer's side is `trainer.publishing` and `trainer.learner.weights`; the engine's side is
`rollout_server.engines.torch_engine.weights`.
"""
