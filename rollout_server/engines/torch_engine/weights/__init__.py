"""Load a new policy version into the engine: the receiving side of `trainer/publishing`.

In: a source from `engines/base.py` that names where the trainer published a version. Out: a
checksum, once the model serves it. `loader.py` picks the transport by the source's type: `disk.py`
reads a folder, `shared.py` maps a file in shared memory, `broadcast.py` receives tensors in a
process group. Each stages the version beside the served one and checks it with `base.py`: names,
shapes, finite values, checksum. Only then, between two steps, the loader swaps it in. If anything
fails before that, the old version keeps serving.

A new transport is one file here and one line in the table of `WeightLoader`.
"""
