"""The process group that carries weights from the trainer's rank 0 to the engines, beside any group there is.

It speaks what SGLang's `/init_weights_update_group` expects on the other side: a TCP store at the trainer, the group's
name as a prefix of its keys, and torch's own way of making a group from a store. Torch is imported when it is used.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

TIMEOUT_S = 60.0
"""How long members wait for each other: at the store, and in a broadcast."""


def open_store(address: str) -> Any:
    """The trainer's store, at a free port of `address` (its `.port`); it does not wait for anybody."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(address, 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))


def connect_store(address: str, port: int) -> Any:
    """An engine's connection to the trainer's store."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(address, port, None, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))


def join_group(store: Any, *, rank: int, world_size: int, name: str, backend: str) -> Any:
    """Meet the others at the store; returns the group when all have come.

    Raises:
        RuntimeError: somebody did not come in time, or the backend is not there.
    """
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

    # Torch's public calls make groups of processes that share a default group. The trainer has one, of its ranks alone.
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        Backend(backend),
        PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    # Else torch does not know who is in it when it is closed.
    _world.pg_group_ranks[group] = {member: member for member in range(world_size)}
    return group


def broadcast(group: Any, tensor: Any) -> None:
    """Rank 0's `tensor` to all; returns when this process has it, or has sent it.

    Raises:
        RuntimeError: a member is gone, or did not answer in time. The group is of no use any more.
    """
    from torch.distributed import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([tensor], options).wait()


def leave_group(group: Any) -> None:
    """Close its connections: members that wait in it fail at once. Others may be gone already."""
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group(group)
