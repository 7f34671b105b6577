"""Low-rank adapters (LoRA, arXiv 2106.09685): `y = W x + (alpha / rank) B A x`, W frozen.

peft inserts the adapters. The trainer draws them, with the same values for any number of ranks,
merges them when the policy is published, and disables them to compute the policy that the run
started from.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agentloop.config import LoraConfig
from agentloop.errors import ConfigError

ADAPTER = "default"
BASE = ".base_layer."
PARTS = (".lora_A.", ".lora_B.")


def is_adapter(name: str) -> bool:
    """Whether a parameter is a matrix of an adapter, by its name."""
    return any(part in name for part in PARTS)


def base_name(name: str) -> str:
    """Return the name of a parameter in the model without adapters."""
    return name.replace(BASE, ".")


def adapter_names(weight: str) -> tuple[str, str]:
    """Return the names of a weight's A and B in a checkpoint."""
    stem = weight.removesuffix(".weight")
    return f"{stem}{PARTS[0]}{ADAPTER}.weight", f"{stem}{PARTS[1]}{ADAPTER}.weight"


def add_adapters(lm: nn.Module, blocks: list[nn.Module], config: LoraConfig) -> None:
    """Add adapters to linear layers of `blocks`; peft freezes the rest. `lm` may be on meta.

    Raises:
        ConfigError: peft is not installed, or no layer has a name that `config` lists.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as exc:
        raise ConfigError("trainer.lora is set, but peft is not installed", "pip install 'agentloop-rl[lora]'") from exc

    inside = {module for block in blocks for module in block.modules()}
    linear = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and module in inside]
    wanted = config.target_modules
    targets = [
        name for name in linear if (wanted == "all-linear" or _named(name, wanted)) and not _named(name, config.exclude)
    ]

    unknown = [] if wanted == "all-linear" else [one for one in wanted if not any(_named(n, [one]) for n in linear)]
    if unknown or not targets:
        fault = f"{', '.join(unknown)} is not a linear layer" if unknown else "trainer.lora.exclude leaves no layer"
        raise ConfigError(
            f"trainer.lora.target_modules: {fault} of this model's blocks",
            f"choose from {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}",
        )

    # peft annotates alpha as an int and only ever divides it by the rank.
    alpha: Any = config.alpha
    peft_config = PeftConfig(r=config.rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=targets)
    inject_adapter_in_model(peft_config, lm, adapter_name=ADAPTER, low_cpu_mem_usage=True)


def _named(name: str, wanted: list[str]) -> bool:
    return any(name == want or name.endswith(f".{want}") for want in wanted)


def initial_adapter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Draw an adapter's matrix; the values depend on the seed and the name alone.

    A is uniform as in a linear layer, B zero: before the first step the adapters change nothing.
    """
    matrix = torch.zeros(shape)
    if PARTS[0] in name:
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
    return matrix


def adapters(lm: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Map each adapted weight's base name to A (rank, in), B (out, rank) and their factor."""
    found = {}
    for name, module in lm.named_modules():
        layer: Any = module  # an instance of peft's class if it has adapters
        if ADAPTER in getattr(layer, "lora_A", ()):
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            found[f"{name}.weight"] = (a, b, float(layer.scaling[ADAPTER]))
    return found


def merged(base: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Return `W + factor B A` of whole matrices, in float32; the cast to the dtype comes after."""
    return torch.addmm(base.float(), b.float(), a.float(), alpha=factor)


@contextlib.contextmanager
def without_adapters(lm: nn.Module) -> Iterator[None]:
    """Disable the adapters inside the block, to compute the policy that the run started from."""
    layers: list[Any] = [module for module in lm.modules() if hasattr(module, "lora_A")]

    # peft's own switch also changes requires_grad, which FSDP2 has already recorded.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class AdapterSnapshot:
    """A copy of this rank's part of all adapters: the policy that a run started from."""

    def __init__(self, lm: nn.Module) -> None:
        self._kept = {name: local.clone() for name, local in _locals(lm)}

    @contextlib.contextmanager
    def in_place_of(self, lm: nn.Module) -> Iterator[None]:
        """Exchange the adapters of `lm` for the kept ones inside the block.

        Values are exchanged in place, because FSDP2 and the optimizer hold the tensors themselves.
        """
        current = {name: local.clone() for name, local in _locals(lm)}
        self._write(lm, self._kept)
        try:
            yield
        finally:
            self._write(lm, current)

    def _write(self, lm: nn.Module, values: dict[str, Tensor]) -> None:
        for name, local in _locals(lm):
            local.copy_(values[name])


def _locals(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's part of each matrix of an adapter."""
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            tensor = parameter.detach()
            yield name, tensor.to_local() if isinstance(tensor, DTensor) else tensor
