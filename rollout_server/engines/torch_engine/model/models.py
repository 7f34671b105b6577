"""Loading a model, finding out what its cache needs, and running it through transformers' own code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from agentloop.errors import ModelError
from agentloop.model_folder import VISION_TYPES
from rollout_server.engines.torch_engine.cache.rows import KVShape
from rollout_server.engines.torch_engine.model.attention import (
    IMPLEMENTATION,
    DecodePass,
    PrefillPass,
    attending,
    transformers_attention,
)
from rollout_server.engines.torch_engine.model.head import FullPrecisionHead
from rollout_server.engines.torch_engine.model.images import ImageReader
from rollout_server.engines.torch_engine.model.vision import VisionRunner, load_image_reader

UNSUPPORTED = ("softcap", "s_aux")
"""Options of transformers' attention functions that ours does not honour: capped scores, attention sinks."""


class Runner(Protocol):
    """Runs the model's layers; the pass writes and reads the KV cache."""

    def prefill(self, chunks: PrefillPass) -> None:
        """Put the chunks' tokens into the cache. No logits: the last token of a prompt is decoded, not prefilled."""
        ...

    def decode(self, tokens: torch.Tensor, batch: DecodePass) -> torch.Tensor:
        """One token [B] for each row of the batch; returns logits [B, V]."""
        ...

    def weights_changed(self) -> None:
        """The model's parameters have new values."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, and what the engine has to know of it."""

    model: Any
    kv: KVShape
    context_length: int
    vocab_size: int
    eos_ids: frozenset[int]
    images: ImageReader | None = None
    """Reads the images of requests; None for a model of text alone."""


def load_model(path: str, *, dtype: torch.dtype, device: torch.device, context_length: int | None) -> LoadedModel:
    """Load a causal language model, or a vision-language one of a family in `VISION_TYPES`.

    Args:
        path: folder that `check_model` has seen, or a hub id.
        context_length: tokens of the longest sequence; None: what the model was made for.

    Raises:
        ModelError: there is no such model, or this engine cannot run it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, transformers_attention)
    try:
        config = AutoConfig.from_pretrained(path)
        vision = config.model_type in VISION_TYPES
        # The vision tower looks at whole images and has no cache: it keeps torch's own attention.
        attention = {"": "sdpa", "text_config": IMPLEMENTATION} if vision else IMPLEMENTATION
        model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=attention, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        reason = str(exc).strip().splitlines() or [type(exc).__name__]
        raise ModelError(f"the model at {path} cannot be loaded: {reason[0]}", "see the folder's config.json") from exc
    model = model.to(device).eval().requires_grad_(False)
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 0) or context_length
    if longest is None:
        raise ModelError(f"{path} does not say how long its context is", "give --context-length")
    if context_length is not None and context_length > longest:
        raise ModelError(
            f"--context-length {context_length} is beyond the model's {longest}", f"give at most {longest}"
        )
    context = context_length or longest
    return LoadedModel(
        model=model,
        kv=_probe(model, context, dtype, device),
        context_length=context,
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        eos_ids=_eos_ids(model, Path(path)),
        images=load_image_reader(model, path) if vision else None,
    )


class ProbePass:
    """Attends to nothing and notes what each layer would have cached, and how it would have attended."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[int, int, int]] = {}
        self.windows: set[int] = set()
        self.others: set[str] = set()

    def attend(
        self, layer: int, q_TAK: torch.Tensor, k_THK: torch.Tensor, v_THD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        self.layers[layer] = (k_THK.shape[1], k_THK.shape[2], v_THD.shape[2])
        return q_TAK.new_zeros(*q_TAK.shape[:2], v_THD.shape[2])

    def note(self, options: dict[str, Any]) -> None:
        """What a layer asks of its attention beyond queries, keys and values."""
        if options.get("sliding_window") is not None:
            self.windows.add(options["sliding_window"])
        self.others |= {name for name in UNSUPPORTED if options.get(name) is not None}


def _probe(model: Any, context: int, dtype: torch.dtype, device: torch.device) -> KVShape:
    """What the cache of `model` looks like, found by running one token.

    Raises:
        ModelError: the model attends in a way that this engine does not know.
    """
    name = type(model).__name__
    probe = ProbePass()
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.inference_mode(), attending(probe):
        model(input_ids=zero, position_ids=zero, use_cache=False)
    window = min(probe.windows, default=context)
    if window < context:
        raise ModelError(
            f"{name} attends within a sliding window of {window} tokens, which the torch engine does not do",
            f"give --context-length {window} or use --engine sglang",
        )
    alike = set(probe.layers) == set(range(model.config.get_text_config().num_hidden_layers))
    if probe.others or not alike or len(set(probe.layers.values())) != 1:
        reason = ", ".join(sorted(probe.others)) or "its layers do not cache alike"
        raise ModelError(f"the torch engine cannot run {name}: {reason}", "use --engine sglang")
    kv_heads, key_dim, value_dim = probe.layers[0]
    return KVShape(len(probe.layers), kv_heads, key_dim, value_dim, dtype, device)


def _eos_ids(model: Any, folder: Path) -> frozenset[int]:
    """The tokens that end a turn: of generation_config.json, else of config.json, and the tokenizer's own."""
    found: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            found.update([eos] if isinstance(eos, int) else eos)
            break
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        data = json.loads(tokenizer.read_text())
        eos = data.get("eos_token")
        text = eos.get("content") if isinstance(eos, dict) else eos
        added = {entry.get("content"): int(i) for i, entry in (data.get("added_tokens_decoder") or {}).items()}
        vocabulary = folder / "tokenizer.json"
        if text not in added and vocabulary.is_file():
            entries = json.loads(vocabulary.read_text()).get("added_tokens") or []
            added.update({entry["content"]: int(entry["id"]) for entry in entries})
        if text in added:
            found.add(added[text])
    return frozenset(found)


def slow_runner(loaded: LoadedModel) -> Runner:
    """What runs any model, through transformers' own code."""
    return VisionRunner(loaded.model) if loaded.images else TransformersRunner(loaded.model)


class TransformersRunner:
    """Any architecture, through transformers' own forward with our attention function."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._body = model.base_model
        self._head = FullPrecisionHead(model)

    def prefill(self, chunks: PrefillPass) -> None:
        with attending(chunks):
            self._body(input_ids=chunks.tokens[None], position_ids=chunks.positions[None], use_cache=False)

    def decode(self, tokens: torch.Tensor, batch: DecodePass) -> torch.Tensor:
        with attending(batch):
            out = self._model(input_ids=tokens[:, None], position_ids=batch.positions[:, None], use_cache=False)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def weights_changed(self) -> None:
        self._head.weights_changed()
