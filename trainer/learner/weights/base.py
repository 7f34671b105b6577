"""Published tensors of a model, and the protocol of a transport."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from agentloop.weights.layout import CODES, TensorSpec, plan_file
from trainer.learner.model.lora import adapters, base_name, is_adapter, merged
from trainer.learner.model.policy import DTYPES
from trainer.types import Published

CAST_BYTES = 2**19
"""Bytes copied and then hashed in one go: large enough for a copy at full speed, small enough to
remain in the core's caches."""

Sink = Callable[[TensorSpec, Tensor], None]
"""Consumes a whole tensor on rank 0, in its own dtype or the published one."""


class Transport(Protocol):
    """One way to publish. Created once, with the `PublishedTensors` of the policy."""

    @property
    def publish(self) -> Callable[..., Published]:
        """Publish the current weights; all ranks call it together.

        Takes keyword arguments of the transport's own, with annotations that pydantic can validate.
        Only rank 0 returns a checksum.
        """


class PublishedTensors:
    """The tensors of one model as they are published: names, dtypes and layout.

    Args:
        lm: the language model, sharded or not.
        dtype: of the published parameters. Buffers keep their own.
    """

    def __init__(self, lm: Any, dtype: str) -> None:
        self._lm = lm
        self._dtype = dtype
        state = lm.state_dict().keys()
        # Tied weights appear once, under their first name; adapters are merged into their base.
        self._tensors: dict[str, Tensor] = {
            base_name(name): parameter for name, parameter in lm.named_parameters() if not is_adapter(name)
        }
        self._adapters = adapters(lm)
        self._parameters = frozenset(self._tensors)
        self._tensors |= {name: buffer for name, buffer in lm.named_buffers() if name in state}
        self.header, self.specs = plan_file((name, self._dtype_of(name), t.shape) for name, t in self._tensors.items())

    @property
    def layout(self) -> list[tuple[str, str, list[int]]]:
        """Name, dtype and shape of each tensor, in the order of files and broadcasts."""
        return [(spec.name, spec.dtype, list(spec.shape)) for spec in self.specs]

    @torch.no_grad()
    def gather(self, sink: Sink | None) -> None:
        """Gather the tensors one by one, in the order of `specs`, and pass each to `sink`.

        All ranks call it together. Those without a sink only take part in the collectives.
        """
        for spec in self.specs:
            tensor = _whole(self._tensors[spec.name])
            if spec.name in self._adapters:
                a, b, factor = self._adapters[spec.name]
                tensor = merged(tensor, _whole(a), _whole(b), factor)
            if sink is not None:
                sink(spec, tensor)

    def write_config(self, folder: Path) -> None:
        """Write the model's configuration files."""
        write_config(self._lm, self._dtype, folder)

    def _dtype_of(self, name: str) -> str:
        return self._dtype if name in self._parameters else str(self._tensors[name].dtype).removeprefix("torch.")


def write_config(lm: Any, dtype: str, folder: Path) -> None:
    """Write `config.json` and `generation_config.json` of a model saved in `dtype`."""
    config = copy.deepcopy(lm.config)
    config.dtype = DTYPES[dtype]
    config.architectures = [type(lm).__name__]
    config.save_pretrained(folder)
    if lm.can_generate():
        lm.generation_config.to_json_file(folder / "generation_config.json")


def chunks(tensor: Tensor, dtype: str) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor, cast to `dtype`, in chunks that fit a core's cache."""
    wanted: torch.dtype = getattr(torch, dtype)
    if tensor.device.type != "cpu":
        tensor = tensor.to("cpu", wanted)
    flat = tensor.reshape(-1)

    if flat.dtype == wanted:
        data = flat.view(torch.uint8).numpy()
        for begin in range(0, len(data), CAST_BYTES):
            yield data[begin : begin + CAST_BYTES]
        return

    step = CAST_BYTES // CODES[dtype][1]
    scratch = torch.empty(step, dtype=wanted)
    for begin in range(0, len(flat), step):
        part = flat[begin : begin + step]
        cast = scratch[: len(part)].copy_(part)
        yield cast.view(torch.uint8).numpy()


def is_first_rank() -> bool:
    return dist.get_rank() == 0


def _whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; all ranks take part."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local() if tensor.device_mesh.size() == 1 else tensor.full_tensor()
    return tensor
