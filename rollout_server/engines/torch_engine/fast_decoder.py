"""The common decoder block (Llama, Mistral, Qwen2, Qwen3), run with few operators.

For small models on a CPU most of a decode step is the cost of calling operators, so this path fuses the projections of
queries, keys and values into one product, those of gate and up likewise, turns the rotary embedding into one complex
multiplication, and packs the matrices for oneDNN, which on many CPUs is twice as fast as torch's default.

It computes what transformers computes, up to rounding. `FastDecoder.build` proves that on the loaded weights and
declines where it does not hold, so that the engine falls back to transformers' own code.

Sizes: T tokens, A attention heads, H key-value heads, K head dim.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F

from rollout_server.engines.torch_engine.attention import AttentionPass, DecodePass, PrefillPass

log = logging.getLogger(__name__)

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
POSITION_FREE_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angle at a position does not depend on the sequence's length: a table can hold them."""

MAX_PARAMETERS = 300_000_000
"""Above, copies of the weights in a second layout cost more memory than the saved operators are worth."""

PACKED_FROM_ROWS = 24
"""oneDNN's product has the higher fixed cost: it wins from about so many rows."""


class Linear:
    """A matrix product with the weight in two layouts: for few rows and for many."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight.contiguous()
        self._bias = bias
        self._packed: torch.Tensor | None = None
        if weight.dtype == torch.float32 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, 64)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is not None and x.shape[0] >= PACKED_FROM_ROWS:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
            return out
        return F.linear(x, self._weight, self._bias)


class Layer:
    """The weights of one decoder block, rearranged."""

    def __init__(self, block: Any, head_dim: int) -> None:
        attention, mlp = block.self_attn, block.mlp
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights = [p.weight for p in projections]
        biases = [p.bias for p in projections]
        # Pairs (i, i + K/2) that the rotary embedding turns become neighbours: one complex number each. The scores
        # do not change when the dims of queries and keys are reordered alike.
        weights[:2] = [_interleave(w, head_dim) for w in weights[:2]]
        if biases[0] is not None:
            biases[:2] = [_interleave(b, head_dim) for b in biases[:2]]
            self.qkv = Linear(torch.cat(weights), torch.cat(biases))
        else:
            self.qkv = Linear(torch.cat(weights), None)
        self.q_norm = _interleave(q_norm.weight, head_dim) if q_norm is not None else None
        self.k_norm = _interleave(k_norm.weight, head_dim) if k_norm is not None else None
        self.o = Linear(attention.o_proj.weight, attention.o_proj.bias)
        self.gate_up = Linear(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), None)
        self.down = Linear(mlp.down_proj.weight, None)
        self.norm_1 = block.input_layernorm.weight
        self.norm_2 = block.post_attention_layernorm.weight


def _interleave(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of each head: [0, K/2, 1, K/2 + 1, ...]."""
    rest = weight.shape[1:]
    return weight.reshape(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(weight.shape)


class FastDecoder:
    """A `Runner` for the architectures it knows; make one with `build`."""

    def __init__(self, model: Any, context_length: int) -> None:
        self._model = model
        config = model.config
        first = model.model.layers[0].self_attn
        self._head_dim: int = first.head_dim
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._scaling: float = first.scaling
        self._eps: float = config.rms_norm_eps
        weight = model.model.embed_tokens.weight
        positions = torch.arange(context_length, device=weight.device)[None]
        # In float32 also for half-precision models: complex numbers of 16-bit floats do not exist.
        cos, sin = model.model.rotary_emb(weight.new_zeros(1, dtype=torch.float32), positions)
        half = self._head_dim // 2
        self._rotation = torch.complex(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        self.weights_changed()

    @classmethod
    def build(cls, model: Any, context_length: int) -> FastDecoder | None:
        """A fast decoder for `model`, or None when the model is not one of the known kind."""
        config = model.config
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if (
            type(model).__name__ not in ARCHITECTURES
            or model.dtype != torch.float32
            or getattr(config, "hidden_act", None) != "silu"
            or getattr(config, "mlp_bias", False)
            or rope not in POSITION_FREE_ROPE
            or sum(p.numel() for p in model.parameters()) > MAX_PARAMETERS
        ):
            return None
        return cls(model, context_length)

    def weights_changed(self) -> None:
        body = self._model.model
        self._embedding = body.embed_tokens.weight
        self._layers = [Layer(block, self._head_dim) for block in body.layers]
        self._norm = body.norm.weight
        self._head = Linear(self._model.lm_head.weight, None)

    def prefill(self, chunks: PrefillPass) -> None:
        self._run(chunks.tokens, chunks.positions, chunks, last_layer_caches_only=True)

    def decode(self, tokens: torch.Tensor, batch: DecodePass) -> torch.Tensor:
        x = self._run(tokens, batch.positions, batch)
        return self._head(F.rms_norm(x, x.shape[-1:], self._norm, self._eps))

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionPass,
        *,
        last_layer_caches_only: bool = False,
    ) -> torch.Tensor:
        heads, kv_heads, dim, eps = self._heads, self._kv_heads, self._head_dim, self._eps
        rotated = heads + kv_heads
        count = tokens.shape[0]
        x = self._embedding[tokens]
        width = x.shape[-1:]
        rotation = self._rotation[positions][:, None]
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(F.rms_norm(x, width, layer.norm_1, eps)).view(count, rotated + kv_heads, dim)
            qk = qkv[:, :rotated]
            if layer.q_norm is not None and layer.k_norm is not None:
                q = F.rms_norm(qk[:, :heads], (dim,), layer.q_norm, eps)
                k = F.rms_norm(qk[:, heads:], (dim,), layer.k_norm, eps)
                qk = torch.cat([q, k], dim=1)
            torch.view_as_complex(qk.unflatten(-1, (dim // 2, 2))).mul_(rotation)
            out = attention.attend(index, qk[:, :heads], qk[:, heads:], qkv[:, rotated:], self._scaling)
            if last_layer_caches_only and index == len(self._layers) - 1:
                break  # nobody reads what comes after the last layer's keys and values
            x.add_(layer.o(out.reshape(count, heads * dim)))
            gate, up = layer.gate_up(F.rms_norm(x, width, layer.norm_2, eps)).chunk(2, dim=-1)
            x.add_(layer.down(F.silu(gate).mul_(up)))
        return x
