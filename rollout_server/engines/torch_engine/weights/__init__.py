"""How a new policy version gets into the engine: the receiving half of `trainer/publishing`.

In comes a source from `engines/base.py` that says where the trainer published a version; out goes a
checksum, once the model serves it. `loader.py` picks the transport by the source's type: `disk.py`
reads a folder, `shared.py` maps a file in shared memory, `broadcast.py` receives tensors in a
process group. Each stages the version beside the served one and checks it with `base.py`: names,
shapes, finite values, checksum. Only then, between two steps, the loader swaps it in. Whatever
fails before leaves the old version serving.

A new transport is one file here and one line in the table of `WeightLoader`.
"""
