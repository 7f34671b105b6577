"""The implementations that a model uses: chosen when it is built, and held by the model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from agentloop.config import TrainerConfig
from trainer.learner.model.attention import Attention
from trainer.learner.model.matmul import Matmul, make_matmul


@dataclass(frozen=True, slots=True)
class Kernels:
    """Attention and matmul of one model. Defaults: a CPU, with torch's own matmul."""

    attention: Attention = field(default_factory=Attention)
    matmul: Matmul = field(default_factory=Matmul)

    @classmethod
    def of(cls, config: TrainerConfig, device: torch.device) -> Kernels:
        """Create the implementations that `trainer.attention` and `trainer.matmul` name.

        Raises:
            ConfigError: an implementation is not installed.
        """
        return cls(Attention(config.attention, device), make_matmul(config.matmul))
