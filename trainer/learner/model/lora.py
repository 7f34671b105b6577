"""Low-rank adapters: `y = W x + (alpha / rank) B A x`, of which only A and B are trained (LoRA, arXiv 2106.09685).

peft puts the adapters in; here is what the trainer does with them: they are drawn alike for any number of ranks, merged
when the policy is handed out, and left out to get the policy that the run started from.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from agentloop.config import LoraConfig
from agentloop.errors import ConfigError

ADAPTER = "default"
BASE = ".base_layer."
PARTS = (".lora_A.", ".lora_B.")


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's matrix."""
    return any(part in name for part in PARTS)


def base_name(name: str) -> str:
    """The name of a parameter in the model without adapters."""
    return name.replace(BASE, ".")


def adapter_names(weight: str) -> tuple[str, str]:
    """What a weight's A and B are called in a checkpoint."""
    stem = weight.removesuffix(".weight")
    return f"{stem}{PARTS[0]}{ADAPTER}.weight", f"{stem}{PARTS[1]}{ADAPTER}.weight"


def add_adapters(lm: nn.Module, blocks: list[nn.Module], config: LoraConfig) -> None:
    """Put adapters into linear layers of `blocks`; peft freezes all the rest. `lm` may be on meta.

    Raises:
        ConfigError: peft is not installed, or no layer has a name that is asked for.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as exc:
        raise ConfigError("trainer.lora is set, and peft is not installed", "pip install 'agentloop-rl[lora]'") from exc
    inside = {module for block in blocks for module in block.modules()}
    linear = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and module in inside]
    asked = config.target_modules
    targets = [
        name for name in linear if (asked == "all-linear" or _named(name, asked)) and not _named(name, config.exclude)
    ]
    unknown = [] if asked == "all-linear" else [want for want in asked if not any(_named(n, [want]) for n in linear)]
    if unknown or not targets:
        fault = f"{', '.join(unknown)} is no linear layer" if unknown else "nothing is left"
        raise ConfigError(
            f"trainer.lora.target_modules: {fault} of this model's blocks",
            f"they have {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}",
        )
    peft_config = PeftConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, bias="none", target_modules=targets
    )
    inject_adapter_in_model(peft_config, lm, adapter_name=ADAPTER, low_cpu_mem_usage=True)


def _named(name: str, wanted: list[str]) -> bool:
    return any(name == want or name.endswith(f".{want}") for want in wanted)


def drawn(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The first values of an adapter's matrix: A uniform as a linear layer's, B zero, so that the policy starts as it
    was. They depend on the seed and the name alone."""
    matrix = torch.zeros(shape)
    if PARTS[0] in name:
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
    return matrix


def adapters(lm: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """For each weight that has one, by its base name: A (rank, in), B (out, rank) and the factor of B A."""
    found = {}
    for name, module in lm.named_modules():
        layers: Any = getattr(module, "lora_A", None)
        if layers is not None and ADAPTER in layers:
            a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight  # type: ignore[index, union-attr]
            found[f"{name}.weight"] = (a, b, float(module.scaling[ADAPTER]))  # type: ignore[index]
    return found


def merged(base: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """`W + factor B A` of whole matrices, in float32: it is cast to the published dtype once, after this."""
    return torch.addmm(base.float(), b.float(), a.float(), alpha=factor)


@contextlib.contextmanager
def without_adapters(lm: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it did before it had adapters."""
    layers = [module for module in lm.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
