"""Publishing weights, on the rank's side. Each transport has a file of the same name in
`trainer.publishing`.

In: the sharded policy, and a `PublishWeights` command. Out: its tensors in a folder, in shared
memory or at the engines, and their checksum.

1. `publisher`: `WeightPublisher`, which owns the transports and runs the one that a command names.
2. `base`: the published tensors (names, dtypes, layout), gathered one by one over all ranks; the
   transport protocol.
3. `disk`: a Hugging Face folder. `shared`: a file in shared memory, written while engines read it.
   `broadcast`: a process group with the engines.

Parameters are gathered one by one, cast to the published dtype and written in place, so that rank 0
never holds a second copy of the model. File layout, checksums and the shared file's progress record
are `agentloop.weights`, which the engines use too.
"""
