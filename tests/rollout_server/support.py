"""Helpers for several test files of the server."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from agentloop.wire import SamplingParams
from rollout_server.engines.base import Generation
from rollout_server.engines.torch_engine.cache.kv import build_cache
from rollout_server.engines.torch_engine.core import Core
from rollout_server.engines.torch_engine.model.fast_decoder import FastDecoder
from rollout_server.engines.torch_engine.model.models import LoadedModel, load_model, slow_runner

VOCAB = 200
EOS = 7
CONTEXT = 512
TOLERANCE = 5e-6
"""Largest difference of a logprob from transformers' own forward pass; float32 rounding of these models is a tenth."""

CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def save_model(folder: Path, kind: str, seed: int, **overrides: Any) -> Path:
    """A tiny model whose norms and biases are random too, so that a path that drops one of them is found out."""
    config_class, model_class = CLASSES[kind]
    options: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "initializer_range": 0.15,
        "tie_word_embeddings": True, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    return _save(model_class(config_class(**{**options, **overrides})), folder)


def _save(model: Any, folder: Path) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif "bias" in name:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return folder


PAD, VISION_START, VISION_END = 190, 192, 193

VISION_CLASSES: dict[str, tuple[Any, Any, int, dict[str, Any]]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, 14, {"embed_dim": 32, "hidden_size": 32}),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        14,
        {"window_size": 56, "fullatt_block_indexes": [1], "out_hidden_size": 32},
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        16,
        {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "out_hidden_size": 32},
    ),
}
"""Config, model, pixels of a patch's side, and what each family's vision tower has of its own."""


def save_vision_model(folder: Path, kind: str, seed: int) -> Path:
    """A tiny vision-language model, its image processor beside it. A merged patch is 28 or 32 pixels a side."""
    config_class, model_class, patch, own = VISION_CLASSES[kind]
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    if kind == "qwen3_vl":
        text["rope_parameters"]["mrope_interleaved"] = True  # transformers always interleaves; SGLang asks
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": patch,
        "spatial_merge_size": 2, "initializer_range": 0.15, **own,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = config_class(
        text_config=text, vision_config=vision, image_token_id=PAD, video_token_id=191,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=True,
    )  # fmt: skip
    size = {"shortest_edge": patch * patch, "longest_edge": patch * patch * 400}
    Qwen2VLImageProcessorPil(patch_size=patch, size=size).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return _save(model_class(config), folder)


def _tokenizer() -> Any:
    """A tokenizer whose neighbouring characters merge: ids that are decoded and encoded again come back changed."""
    words = [chr(0x4E00 + i) for i in range(100)]
    merges = [(words[i], words[i + 1]) for i in range(PAD - len(words))]
    vocab = {word: i for i, word in enumerate([*words, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = Fuse()  # without blanks, as the tokenizers of these families
    tokenizer.add_special_tokens(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    assert tokenizer.token_to_id("<|image_pad|>") == PAD
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[EOS], pad_token=words[0])


def picture(width: int, height: int, seed: int = 0) -> str:
    """A picture of random colours, as base64 of a PNG file."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def load(folder: Path, context_length: int | None = None) -> LoadedModel:
    return load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"), context_length=context_length)


def make_core(
    loaded: LoadedModel,
    *,
    fast: bool = True,
    invariant: bool = False,
    max_running: int = 16,
    kv_tokens: int = 16_384,
    chunk: int = 1024,
) -> Core:
    runner = FastDecoder.build(loaded, invariant=invariant) if fast else slow_runner(loaded)
    assert runner is not None
    cache = build_cache(
        loaded.kv, loaded.context_length, max_running=max_running, max_kv_tokens=kv_tokens, memory_bytes=2**30
    )
    return Core(
        runner,
        cache,
        eos_ids=loaded.eos_ids,
        max_running=max_running,
        device=torch.device("cpu"),
        prefill_chunk=chunk,
        never_sampled=loaded.placeholders.never_sampled if loaded.placeholders else (),
    )


def request(ids: Sequence[int], new: int = 8, rid: str = "r", **sampling: Any) -> Generation:
    return Generation(rid, list(ids), SamplingParams(max_new_tokens=new, **sampling))


def random_ids(count: int, seed: int, below: int = VOCAB) -> list[int]:
    """Token ids without the end token."""
    rnd = random.Random(seed)
    return [rnd.randrange(EOS + 1, below) for _ in range(count)]


def mixed_requests(count: int, **sampling: Any) -> list[Generation]:
    """Requests of many lengths, some of which share their prompt's start, with temperatures 0, 1 and 0.7."""
    rnd = random.Random(5)
    shared = random_ids(200, seed=99)
    requests = []
    for i in range(count):
        prompt = random_ids(rnd.randint(1, 150), seed=i)
        if i % 3 == 0:
            prompt = shared[: rnd.randint(1, 200)] + prompt[:5]
        options = {"temperature": (0.0, 1.0, 0.7)[i % 3], "sampling_seed": i, "ignore_eos": True, **sampling}
        requests.append(request(prompt, new=rnd.randint(1, 90), rid=str(i), **options))
    return requests


def run(core: Core, requests: Sequence[Generation]) -> list[Any]:
    """Run them together; returns them finished, in the order given."""
    running = [core.add(generation) for generation in requests]
    while core.busy:
        core.step()
    return running


class Reference:
    """transformers' own forward pass, attention and all."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int], start: int, temperature: float) -> list[float]:
        """Of `ids[start:]`, each given all before it; temperature 0 counts as 1."""
        logits = self._model(torch.tensor([list(ids)])).logits[0, start - 1 : -1]
        table = torch.log_softmax(logits / (temperature or 1.0), -1)
        return [float(table[i, token]) for i, token in enumerate(ids[start:])]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], start: int) -> list[list[float]]:
        """From which each of `ids[start:]` was drawn."""
        table: list[list[float]] = self._model(torch.tensor([list(ids)])).logits[0, start - 1 : -1].tolist()
        return table

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], new: int) -> list[int]:
        ids = list(ids)
        for _ in range(new):
            ids.append(int(self._model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[-new:]

    def worst(self, finished: Sequence[Any]) -> float:
        """The largest difference between the engine's logprobs and this model's."""
        differences = [0.0]
        for running in finished:
            temperature = running.generation.sampling.temperature
            expected = self.logprobs(running.ids, running.prompt_length, temperature)
            differences += [abs(a - b) for a, b in zip(running.result.logprobs, expected, strict=True)]
        return max(differences)
