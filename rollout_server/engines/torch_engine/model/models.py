"""Load a model, determine its cache layout, and run it through transformers' own code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from agentloop.errors import ModelError
from agentloop.model_folder import VISION_TYPES, ModelFolder, check_files, load_pretrained
from agentloop.model_folder.files import read_json
from agentloop.model_folder.pretrained import build_model, load_config, model_class
from agentloop.model_folder.tensors import compare_with, refuse_nonfinite
from rollout_server.engines.torch_engine.cache.rows import KVShape
from rollout_server.engines.torch_engine.model.attention import DecodePass, PrefillPass
from rollout_server.engines.torch_engine.model.attention_hook import AttentionHook, ProbePass
from rollout_server.engines.torch_engine.model.head import FullPrecisionHead
from rollout_server.engines.torch_engine.model.images import PromptImageReader
from rollout_server.engines.torch_engine.model.vision import VisionRunner, load_image_reader
from rollout_server.placeholders import Placeholders, placeholders_of


class Runner(Protocol):
    """Runs the model's layers; the pass that it is given reads and writes the KV cache."""

    def prefill(self, chunks: PrefillPass) -> None:
        """Put the chunks' tokens into the cache. No logits: a prompt's last token is decoded."""
        ...

    def decode(self, tokens: torch.Tensor, batch: DecodePass) -> torch.Tensor:
        """Run one token [B] for each row of the batch; returns logits [B, V]."""
        ...

    def weights_changed(self) -> None:
        """Drop everything computed from the model's old parameters."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and the facts that the engine needs.

    Attributes:
        attention: the attention function that `model` was loaded with.
        head: its output layer in full precision; None if it has its own.
        kv: cache size of one token.
        context_length: tokens of the longest sequence.
        eos_ids: tokens that end a turn.
        images: reads the images of requests; None for a text model.
        placeholders: the tokens that stand for its images; None for a text model.
    """

    model: Any
    attention: AttentionHook
    head: FullPrecisionHead | None
    kv: KVShape
    context_length: int
    vocab_size: int
    eos_ids: frozenset[int]
    images: PromptImageReader | None = None
    placeholders: Placeholders | None = None


def load_model(
    path: str, *, dtype: torch.dtype, device: torch.device, context_length: int | None, trust_remote_code: bool = False
) -> LoadedModel:
    """Load a causal language model, or a vision-language one of a family in `VISION_TYPES`.

    Args:
        path: a model's folder, or a hub id.
        context_length: tokens of the longest sequence; None: the model's maximum.
        trust_remote_code: whether Python code that the folder brings may run.

    Raises:
        ModelError: there is no such model, its files do not hold exactly the tensors of its
            architecture with finite values, or this engine cannot run it.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = ModelFolder.resolve(path, key="--model", code=trust_remote_code)
    check_files(folder)
    path = str(folder.path)
    config = load_config(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        compare_with(build_model(config, path, trust_remote_code=trust_remote_code), folder)

    hook = AttentionHook()
    vision = config.model_type in VISION_TYPES
    model = load_pretrained(
        model_class(config),
        path,
        "its weights",
        trust_remote_code=trust_remote_code,
        config=config,
        dtype=dtype,
        # The vision tower runs over whole images without a cache, so it keeps torch's own
        # attention.
        attn_implementation={"": "sdpa", "text_config": hook.name} if vision else hook.name,
        use_safetensors=True,
    )
    for name, parameter in model.named_parameters():
        refuse_nonfinite(parameter, name, path)

    head = FullPrecisionHead.install(model)
    model = model.to(device).eval().requires_grad_(False)

    longest = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 0) or context_length
    if longest is None:
        raise ModelError(f"the config of {path} has no max_position_embeddings", "set --context-length")
    if context_length is not None and context_length > longest:
        raise ModelError(
            f"--context-length {context_length} exceeds the model's maximum of {longest}", f"set at most {longest}"
        )

    context = context_length or longest
    placeholders = placeholders_of(folder) if vision else None
    return LoadedModel(
        model=model,
        attention=hook,
        head=head,
        kv=_probe(model, hook, context, dtype, device),
        context_length=context,
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        eos_ids=_eos_ids(model, Path(path)),
        images=load_image_reader(model, path, placeholders, trust_remote_code=trust_remote_code)
        if placeholders
        else None,
        placeholders=placeholders,
    )


def _probe(model: Any, hook: AttentionHook, context: int, dtype: torch.dtype, device: torch.device) -> KVShape:
    """Determine what `model` caches for a token, by running one.

    Raises:
        ModelError: the model attends in a way that this engine does not implement.
    """
    name = type(model).__name__
    probe = ProbePass()
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.inference_mode(), hook.attending(probe):
        model(input_ids=zero, position_ids=zero, use_cache=False)

    window = min(probe.windows, default=context)
    if window < context:
        raise ModelError(
            f"{name} attends within a sliding window of {window} tokens, which the torch engine does not support",
            f"set --context-length {window} or use --engine sglang",
        )

    alike = set(probe.layers) == set(range(model.config.get_text_config().num_hidden_layers))
    if probe.unsupported or not alike or len(set(probe.layers.values())) != 1:
        reason = ", ".join(sorted(probe.unsupported)) or "its layers cache keys and values of different shapes"
        raise ModelError(f"the torch engine cannot run {name}: {reason}", "use --engine sglang")

    kv_heads, key_dim, value_dim = probe.layers[0]
    return KVShape(len(probe.layers), kv_heads, key_dim, value_dim, dtype, device)


def _eos_ids(model: Any, folder: Path) -> frozenset[int]:
    """The tokens that end a turn: those of generation_config.json, else of config.json, and the
    tokenizer's."""
    found: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            found.update([eos] if isinstance(eos, int) else eos)
            break

    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        try:
            found.update(_tokenizer_eos(tokenizer, folder / "tokenizer.json"))
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise ModelError(
                f"the tokens that end a turn cannot be read from {tokenizer}: {exc!r}", "download the model again"
            ) from exc

    return frozenset(found)


def _tokenizer_eos(config: Path, vocabulary: Path) -> Iterator[int]:
    """Yield the id of the tokenizer's end-of-sequence token, if it has one."""
    data = read_json(config)
    eos = data.get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    added = {entry.get("content"): int(i) for i, entry in (data.get("added_tokens_decoder") or {}).items()}
    if text not in added and vocabulary.is_file():
        entries = read_json(vocabulary).get("added_tokens") or []
        added.update({entry["content"]: int(entry["id"]) for entry in entries})
    if text in added:
        yield added[text]


def slow_runner(loaded: LoadedModel) -> Runner:
    """Return a runner for any model, through transformers' own code."""
    if loaded.images is not None:
        return VisionRunner(loaded.model, loaded.attention, loaded.head)
    return TransformersRunner(loaded)


class TransformersRunner:
    """A `Runner` for any architecture: transformers' forward with our attention function."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded.model
        self._body = loaded.model.base_model
        self._attention = loaded.attention
        self._head = loaded.head

    def prefill(self, chunks: PrefillPass) -> None:
        with self._attention.attending(chunks):
            self._body(input_ids=chunks.tokens[None], position_ids=chunks.positions[None], use_cache=False)

    def decode(self, tokens: torch.Tensor, batch: DecodePass) -> torch.Tensor:
        with self._attention.attending(batch):
            out = self._model(input_ids=tokens[:, None], position_ids=batch.positions[:, None], use_cache=False)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def weights_changed(self) -> None:
        if self._head is not None:
            self._head.weights_changed()
