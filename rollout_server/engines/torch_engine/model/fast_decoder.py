"""The common decoder block (Llama, Mistral, Qwen2, Qwen3), run with few operators.

For small models on a CPU, most of a decode step is operator overhead. So this path fuses the
projections of queries, keys and values into one matmul, and those of gate and up into another,
computes the rotary embedding as one complex multiplication, and packs the matrices for oneDNN,
which on many CPUs is twice as fast as torch's default.

It computes what transformers computes, up to rounding. `FastDecoder.build` checks that on the
loaded weights. If the check fails, the engine runs transformers' own code.

Sizes: T tokens, A attention heads, H key-value heads, K head dim.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from rollout_server.engines.torch_engine.cache.kv import KVCache
from rollout_server.engines.torch_engine.model.attention import AttentionPass, Chunk, DecodePass, PrefillPass
from rollout_server.engines.torch_engine.model.models import LoadedModel, Runner, TransformersRunner

log = logging.getLogger(__name__)

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
POSITION_FREE_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on the sequence's length, so that a table can hold
them."""

MAX_PARAMETERS = 300_000_000
"""Above this size, the memory for copies of the weights in a second layout is not worth the saved
operators."""

MAX_DIFFERENCE = 1e-3
"""Largest difference of a logprob from transformers' at which the fast path is used: far above
float32 rounding, far below the effect of a wrong constant."""

PACKED_FROM_ROWS = 24
"""oneDNN's matmul has a higher fixed cost: with a small weight it is faster from about this many
rows on."""

PACKED_WEIGHT = 2**17
"""With a weight of at least this many elements it is faster for any number of rows."""

FEWEST_ROWS = 4
"""A matmul of at least this many rows gives each row the same bits, whatever the other rows. For
fewer rows the libraries use other kernels, which sum in another order."""


class Linear:
    """A linear layer with its weight in two layouts: for few rows and for many.

    Args:
        invariant: make each row's result depend on that row alone, to the bit.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, invariant: bool) -> None:
        self._weight: torch.Tensor | None = weight.contiguous()
        self._bias = bias
        self._packed: torch.Tensor | None = None
        self._packed_from = PACKED_FROM_ROWS if weight.numel() < PACKED_WEIGHT else 1
        self._fewest = FEWEST_ROWS if invariant else 1
        if weight.dtype == torch.float32 and weight.device.type == "cpu" and _one_dnn():
            self._packed = _packed(weight.contiguous())
            if invariant and not _layouts_agree(weight.shape[0], weight.shape[1]):
                self._packed_from = FEWEST_ROWS
            if self._packed_from <= self._fewest:
                self._weight = None  # never used: a fused weight is then freed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if rows < self._fewest:
            # Pad with copies to a number of rows that the invariant kernels take.
            return self(torch.cat([x, x[:1].expand(self._fewest - rows, -1)]))[:rows]
        if self._weight is None or (self._packed is not None and rows >= self._packed_from):
            assert self._packed is not None
            return _packed_matmul(x, self._packed, self._bias)
        return F.linear(x, self._weight, self._bias)


def _one_dnn() -> bool:
    return bool(torch.backends.mkldnn.is_available())


def _packed(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
    return packed


def _packed_matmul(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


@cache
def _layouts_agree(outputs: int, inputs: int) -> bool:
    """Whether both matmuls give the same bits for a weight of this shape; they do if neither splits
    the sum."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(outputs, inputs, generator=generator), torch.randn(64, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    wide = _packed_matmul(x, _packed(weight), bias)
    return all(torch.equal(F.linear(x[:rows], weight, bias), wide[:rows]) for rows in (4, 7, PACKED_FROM_ROWS, 64))


class Layer:
    """The weights of one decoder block, rearranged."""

    def __init__(self, block: Any, head_dim: int, *, invariant: bool) -> None:
        attention, mlp = block.self_attn, block.mlp
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights = [p.weight for p in projections]
        biases = [p.bias for p in projections]

        # The pairs (i, i + K/2) that the rotary embedding rotates become neighbours: one complex
        # number each. Scores do not change if the dims of queries and keys are reordered alike.
        weights[:2] = [_interleave(w, head_dim) for w in weights[:2]]
        bias = None
        if biases[0] is not None:
            bias = torch.cat([_interleave(b, head_dim) for b in biases[:2]] + biases[2:])
        self.qkv = Linear(torch.cat(weights), bias, invariant=invariant)
        self.q_norm = _interleave(q_norm.weight, head_dim) if q_norm is not None else None
        self.k_norm = _interleave(k_norm.weight, head_dim) if k_norm is not None else None

        self.o = Linear(attention.o_proj.weight, attention.o_proj.bias, invariant=invariant)
        self.gate_up = Linear(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), None, invariant=invariant)
        self.down = Linear(mlp.down_proj.weight, None, invariant=invariant)
        self.norm_1 = block.input_layernorm.weight
        self.norm_2 = block.post_attention_layernorm.weight


def _interleave(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of each head: [0, K/2, 1, K/2 + 1, ...]."""
    rest = weight.shape[1:]
    return weight.reshape(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(weight.shape)


class FastDecoder:
    """A `Runner` for `ARCHITECTURES`; `build` makes one."""

    def __init__(self, model: Any, context_length: int, *, invariant: bool = False) -> None:
        self._model = model
        self._invariant = invariant
        self._layers: list[Layer] = []
        config = model.config
        first = model.model.layers[0].self_attn
        self._head_dim: int = first.head_dim
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._scaling: float = first.scaling
        self._eps: float = config.rms_norm_eps

        weight = model.model.embed_tokens.weight
        positions = torch.arange(context_length, device=weight.device)[None]
        # float32, because torch has no complex numbers of 16-bit floats.
        cos, sin = model.model.rotary_emb(weight.new_zeros(1, dtype=torch.float32), positions)
        half = self._head_dim // 2
        self._rotation = torch.complex(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        self.weights_changed()

    @classmethod
    def build(cls, loaded: LoadedModel, *, invariant: bool = False) -> FastDecoder | None:
        """A fast decoder for the model; None if its architecture is not supported or its results
        differ.

        Args:
            invariant: make a token's logits and its entries in the cache depend, to the bit, on the
                tokens up to it alone: not on the batch, on where prompts are cut, or on what was
                cached. This needs a CPU and one thread; `is_batch_invariant` tests whether this
                machine's kernels comply.
        """
        model, config = loaded.model, loaded.model.config
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

        fast = cls(model, loaded.context_length, invariant=invariant)
        difference = _difference(fast, TransformersRunner(loaded), loaded)
        if not difference <= MAX_DIFFERENCE:
            log.warning(
                "logprobs of the fast decoder differ from transformers' by %.1e: running transformers' own code",
                difference,
            )
            return None
        return fast

    def weights_changed(self) -> None:
        """Rebuild the fused and packed copies of the weights."""
        body = self._model.model
        self._embedding = body.embed_tokens.weight
        layers = list(body.layers)
        # One by one: the old copies of all of them would take as much memory again.
        self._layers = self._layers[: len(layers)]
        for index, block in enumerate(layers):
            self._layers[index : index + 1] = [Layer(block, self._head_dim, invariant=self._invariant)]
        self._norm = body.norm.weight
        self._head = Linear(self._model.lm_head.weight, None, invariant=self._invariant)

    def prefill(self, chunks: PrefillPass) -> None:
        chunks.as_decode = self._invariant
        x = self._embedding[chunks.tokens]
        rotation = self._rotation[chunks.positions][:, None]
        for index, layer in enumerate(self._layers[:-1]):
            x = self._block(index, layer, x, rotation, chunks)

        # A prompt needs no output: only the keys and values of the last layer.
        _, k, v = self._project(self._layers[-1], x, rotation)
        chunks.store(len(self._layers) - 1, k, v)

    def decode(self, tokens: torch.Tensor, batch: DecodePass) -> torch.Tensor:
        if self._invariant and len(tokens) == 1:
            # Compute a single token in several copies, which is cheaper than padding before each
            # matmul.
            tokens = tokens.expand(FEWEST_ROWS)

        x = self._embedding[tokens]
        rotation = self._rotation[batch.positions][:, None]
        for index, layer in enumerate(self._layers):
            x = self._block(index, layer, x, rotation, batch)
        return self._head(self._normalize(x, self._norm))[: len(batch.positions)]

    def _block(
        self, index: int, layer: Layer, x: torch.Tensor, rotation: torch.Tensor, attention: AttentionPass
    ) -> torch.Tensor:
        rows = rotation.shape[0]  # x may have padding copies after them
        q, k, v = self._project(layer, x, rotation)
        out = attention.attend(index, q[:rows], k[:rows], v[:rows], self._scaling)
        x.add_(layer.o(out.reshape(rows, -1)))
        gate, up = layer.gate_up(self._normalize(x, layer.norm_2)).chunk(2, dim=-1)
        return x.add_(layer.down(F.silu(gate).mul_(up)))

    def _project(
        self, layer: Layer, x: torch.Tensor, rotation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values, rotated."""
        heads, dim = self._heads, self._head_dim
        rotated = heads + self._kv_heads
        qkv = layer.qkv(self._normalize(x, layer.norm_1)).view(x.shape[0], rotated + self._kv_heads, dim)
        qk = qkv[:, :rotated]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(qk[:, :heads], (dim,), layer.q_norm, self._eps)
            k = F.rms_norm(qk[:, heads:], (dim,), layer.k_norm, self._eps)
            qk = torch.cat([q, k], dim=1)

        torch.view_as_complex(qk.view(*qk.shape[:2], dim // 2, 2)).mul_(rotation)
        return qk[:, :heads], qk[:, heads:], qkv[:, rotated:]

    def _normalize(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self._eps)


@torch.inference_mode()
def _difference(fast: Runner, reference: Runner, loaded: LoadedModel) -> float:
    """Return the largest difference between two runners' logprobs after a short prompt."""
    length = min(24, loaded.context_length - 1)
    ids = [(7 * i * i + 3) % loaded.vocab_size for i in range(length)]
    logprobs = []
    for runner in (fast, reference):
        cache = KVCache(loaded.kv, 0, loaded.context_length)
        row = cache.place(ids, length + 1, None, 0)
        assert row is not None
        runner.prefill(PrefillPass([Chunk(row, 0, length - 1)]))
        batch = DecodePass(cache, [length - 1], [True], loaded.kv.device)
        logprobs.append(torch.log_softmax(runner.decode(torch.tensor(ids[-1:], device=loaded.kv.device), batch), -1))
    return float((logprobs[0] - logprobs[1]).abs().max())
