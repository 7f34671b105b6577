"""The process group that carries weights from the trainer's rank 0 to the engines.

It follows the protocol of SGLang's `/init_weights_update_group`: a TCP store at the trainer, the
group's name as a prefix of its keys, and torch's own way of making a group from a store. Torch is
imported when a function is called.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

TIMEOUT_S = 60.0
"""Maximum time that members wait for each other, at the store and in a broadcast."""


def open_store(address: str) -> Any:
    """Open the trainer's store at a free port (`.port`) of `address`; do not wait for engines."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(address, 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))


def connect_store(address: str, port: int) -> Any:
    """Connect an engine to the trainer's store."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(address, port, None, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))


def join_group(store: Any, *, rank: int, world_size: int, name: str, backend: str) -> Any:
    """Wait at the store for the other members, and return the group.

    Raises:
        RuntimeError: a member did not join in time, or the backend is not available.
    """
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

    # Torch's public functions make groups of processes that share a default group. The trainer's
    # default group holds its own ranks only.
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        Backend(backend),
        PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]  # annotated as GroupName, a NewType of str
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    # Torch looks up the members here when it closes the group.
    _world.pg_group_ranks[group] = {member: member for member in range(world_size)}
    return group


def broadcast(group: Any, tensor: Any) -> None:
    """Send rank 0's `tensor` to all members; return when this process has sent or received it.

    Raises:
        RuntimeError: a member has ended or timed out. The group cannot be used any more.
    """
    from torch.distributed import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([tensor], options).wait()


def leave_group(group: Any) -> None:
    """Close the connections of a group. Members waiting in it fail immediately."""
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):  # other members may have ended already
        dist.destroy_process_group(group)
