"""A model folder in the Hugging Face layout: its place, and the facts in its config.json."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agentloop.errors import ModelError
from agentloop.model_folder.files import AGAIN, StoredTensor, read_json, read_weights
from agentloop.model_folder.hub import download, may_be_hub_id
from agentloop.text import clean

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""Files of tokenizers and image processors, which are copied together with `*.jinja`."""

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Patterns of the files that make up a model on the hub."""

CODE_FILES = ("*.py",)
"""Patterns of the code that a model may bring; fetched only with `model.trust_remote_code`."""

TEMPLATE_FILE = "chat_template.jinja"
"""The file in which transformers looks for a chat template first."""

VISION_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""`model_type` of the models whose vision tower is loaded, by the server and by the trainer."""


ENTRIES = 1_000
"""Entries of a folder without a model that are looked at for one."""

SHOWN = 3
"""Models that a message names."""


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk. Cheap to create: config.json is read on first use, once.

    Sizes are None where config.json does not name them.

    Attributes:
        path: the folder, which may be missing: check `has_config`.
    """

    path: Path

    @classmethod
    def resolve(
        cls, name: str, files: Sequence[str] = MODEL_FILES, *, key: str = "model.path", code: bool = False
    ) -> ModelFolder:
        """Find a model folder, or download a model from the hub.

        Args:
            name: folder or hub id.
            files: patterns of the files to download.
            key: the setting that names it, for messages.
            code: also download the model's own code (`model.trust_remote_code`).

        Raises:
            ModelError: the folder is not a model, or the download failed.
        """
        folder = cls.find(name, (*files, *CODE_FILES) if code else files, key=key)
        if folder.path.is_dir() and not folder.has_config:
            if (folder.path / ADAPTER_FILE).is_file():
                raise _adapter(f"{key} {name}")
            raise ModelError(f"{key} {name} has no {CONFIG_FILE}", _fix_without_config(Path(name)))
        return folder

    @classmethod
    def find(cls, name: str, files: Sequence[str] = MODEL_FILES, *, key: str = "model.path") -> ModelFolder:
        """Find a folder, or download files of a hub model, whatever the folder holds.

        Raises:
            ModelError: there is no such folder and no such hub model, or the download failed.
        """
        path = Path(name)
        if "\0" in name or (path.exists() and not path.is_dir()):
            raise ModelError(f"{key} {name!r} is not a folder", "give the folder of a Hugging Face model, or a hub id")
        if path.is_dir():
            return cls(path.resolve())
        if not may_be_hub_id(name):
            raise ModelError(f"{key} {name} does not exist", "give the folder of a Hugging Face model, or a hub id")
        try:
            return cls(download(name, files))
        except OSError as exc:
            hint = "give the folder of a Hugging Face model, or the id of a model that can be reached"
            if "." in key:  # a key of a recipe, not an option
                hint += "; `agentloop check --offline` checks the rest of a recipe without it"
            raise ModelError(
                f"{key} {name} is not a folder and could not be downloaded from the hub: {exc}", hint
            ) from exc

    @property
    def has_config(self) -> bool:
        return (self.path / CONFIG_FILE).is_file()

    @property
    def has_weights(self) -> bool:
        return any(self.path.glob("*.safetensors"))

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json.

        Raises:
            ModelError: the file is missing or is not a JSON object.
        """
        return read_json(self.path / CONFIG_FILE)

    @cached_property
    def weights(self) -> dict[str, StoredTensor]:
        """The tensors in the folder's safetensors files by name, from their headers.

        Raises:
            ModelError: as `files.read_weights`.
        """
        named = self.config.get("transformers_weights")
        if named is not None and not isinstance(named, str):
            raise ModelError(f"transformers_weights in {self.path / CONFIG_FILE} is not a file name", AGAIN)
        return read_weights(self.path, named)

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's section; for a text-only model, all of config.json."""
        text = self.config.get("text_config") or self.config
        if not isinstance(text, dict):
            raise ModelError(f"text_config in {self.path / CONFIG_FILE} is not an object", AGAIN)
        return text

    @property
    def model_type(self) -> str | None:
        return self.config.get("model_type")

    @property
    def takes_images(self) -> bool:
        return "vision_config" in self.config

    @property
    def image_token_id(self) -> int | None:
        """The placeholder token of images."""
        return self.config.get("image_token_id")

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """The placeholder tokens of images and videos: a prompt may hold them, a model not."""
        found = (self.config.get(f"{kind}_token_id") for kind in ("image", "video"))
        return tuple(token for token in found if isinstance(token, int))

    @property
    def hidden_size(self) -> int | None:
        return self._size("hidden_size")

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding: one more than the largest token id."""
        return self._size("vocab_size")

    @property
    def context_length(self) -> int | None:
        """Tokens of the longest sequence that the model supports."""
        return self._size("max_position_embeddings")

    @property
    def quantization(self) -> str | None:
        """Method of a quantized checkpoint; None: its weights are plain numbers."""
        for section in (self.config, self.text_config):
            for key in ("quantization_config", "compression_config"):
                settings = section.get(key)
                if settings:
                    method = settings.get("quant_method") if isinstance(settings, dict) else None
                    return str(method or "of an unknown method")
        return None

    def _size(self, key: str) -> int | None:
        size = self.text_config.get(key) or self.config.get(key)
        if size in (None, 0):
            return None
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ModelError(f"{key} in {self.path / CONFIG_FILE} is {size!r}, not a positive integer", AGAIN)
        return size


def _fix_without_config(folder: Path) -> str:
    """Return what to give instead of a folder that is not a model: the models in it, or how to get
    the model of a run."""
    fix = "give the folder of a Hugging Face model"
    found: list[str] = []
    with contextlib.suppress(OSError):
        entries = itertools.islice(folder.iterdir(), ENTRIES)
        found = sorted(clean(entry, 300) for entry in entries if (entry / CONFIG_FILE).is_file())
    if found:
        return f"{fix}; found: {', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''}"
    if (folder / "checkpoints").is_dir() and (folder / "config" / "resolved.json").is_file():
        return (
            f"this is a run: write its model with agentloop export {clean(folder, 300)} --out <folder>, and give that"
        )
    return fix


def _adapter(where: str) -> ModelError:
    return ModelError(
        f"{where} is a LoRA adapter, not a model",
        "merge it into its base model with peft's merge_and_unload, save that, and give that folder",
    )


def refuse_adapter(folder: Path) -> None:
    """Refuse an adapter in a model folder: transformers would add it to the model, unasked.

    Raises:
        ModelError: there is one.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise ModelError(
            f"{folder} holds a LoRA adapter ({ADAPTER_FILE}) beside the model",
            "merge it with peft's merge_and_unload and save the result, or move the adapter to a folder of its own",
        )
