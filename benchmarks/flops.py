"""Floating-point operations of a packed micro-batch, which benchmarks divide by a card's peak. No torch.

This counts the work of the model, not of the machine: recomputation by activation checkpointing or
chunked logits is left out, and so are norms, rotations and activations, which are not matmuls
(model FLOPs, arXiv 2204.02311, appendix B; per-layer terms as in arXiv 2104.04473, section 5.1,
with the pairs that causal attention really computes).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agentloop.model_folder import ModelFolder
from trainer.packing.layout import PackedBatch, PackedLayout

TRAINING = 3
"""Factor of forward and backward: the backward pass of a matmul is two of its size."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder with gated MLPs (Qwen2, Qwen3, Llama, Mistral, Gemma).

    Attributes:
        hidden, mlp, vocab: widths of the hidden state, of the MLP and of the logits.
        heads, key_heads, head_dim: of the attention.
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    key_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, model_path: Path | str) -> ModelShape:
        """Read a model folder's `config.json`; of a vision-language model, its text part."""
        folder = ModelFolder(Path(model_path))
        text = folder.text_config
        heads = int(text["num_attention_heads"])
        return cls(
            layers=int(text["num_hidden_layers"]),
            hidden=int(text["hidden_size"]),
            mlp=int(text["intermediate_size"]),
            heads=heads,
            key_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
            vocab=int(text.get("vocab_size") or folder.config["vocab_size"]),
        )

    @property
    def block_weights(self) -> int:
        """Weights of one block's matrices: queries and output, keys and values, gate, up and down."""
        attention = 2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.key_heads * self.head_dim
        return attention + 3 * self.hidden * self.mlp


def attention_pairs(layout: PackedLayout) -> int:
    """(query, key) pairs of one head: each segment causally to itself, and to all of a shared prompt."""
    own = sum(count * length * (length + 1) // 2 for _, count, length in layout.runs)
    return own + sum(length * prompt for _, length, _, prompt in layout.prefixes)


def packed_flops(shape: ModelShape, batch: PackedBatch, *, training: bool = True) -> float:
    """Operations (a multiply and an add are two) of one micro-batch.

        forward = layers (2 T W + 4 P H D) + 2 N E V        training = 3 forward

    T packed tokens, W weights of a block, P pairs, H heads, D head dimension, N trained tokens, E
    hidden, V vocabulary: queries times keys and weights times values are 2 P H D each; the head is
    applied to trained tokens only.
    """
    blocks = 2 * len(batch.tokens) * shape.block_weights
    attention = 4 * attention_pairs(batch.layout) * shape.heads * shape.head_dim
    head = 2 * len(batch.targets) * shape.hidden * shape.vocab
    return float((shape.layers * (blocks + attention) + head) * (TRAINING if training else 1))
