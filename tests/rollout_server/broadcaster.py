"""A trainer's rank 0, for tests: joins a weights group and broadcasts a safetensors file.

    python broadcaster.py WORLD_SIZE [NAME]

It prints its store's port, joins, prints `joined`, and then takes lines of `FILE BUCKET_BYTES` (0: tensor by tensor);
after each it prints `sent`, or what went wrong. It runs on any torch.
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file

from agentloop.weights.group import broadcast, join_group, leave_group, open_store
from agentloop.weights.layout import buckets


def layout(file: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    tensors = load_file(file)
    return sorted(tensors), tensors


def main() -> None:
    world_size = int(sys.argv[1])
    name = sys.argv[2] if len(sys.argv) > 2 else "weight_update_group"
    store = open_store("127.0.0.1")
    print(json.dumps({"port": store.port, "torch": torch.__version__}), flush=True)
    group = join_group(store, rank=0, world_size=world_size, name=name, backend="gloo")
    print("joined", flush=True)
    for line in sys.stdin:
        file, bucket_bytes = line.split()
        names, tensors = layout(file)
        try:
            if int(bucket_bytes):
                for bucket in buckets([tensors[n].nbytes for n in names], int(bucket_bytes)):
                    parts = [tensors[names[i]].reshape(-1).view(torch.uint8) for i in bucket]
                    broadcast(group, torch.cat(parts))
            else:
                for n in names:
                    broadcast(group, tensors[n])
            print("sent", flush=True)
        except RuntimeError as exc:
            print(f"failed: {exc}".replace("\n", " "), flush=True)
    leave_group(group)


if __name__ == "__main__":
    main()
