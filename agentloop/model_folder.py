"""Read a model folder in the Hugging Face layout: its place, its config.json, its tokenizer.

No other module reads such folders. torch and transformers are imported only to load an image
processor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, ModelError

CONFIG_FILE = "config.json"

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

TEMPLATE_FILE = "chat_template.jinja"
"""The file in which transformers looks for a chat template first."""

VISION_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""`model_type` of the models whose vision tower is loaded, by the server and by the trainer."""


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk. Cheap to create: config.json is read on first use, once.

    Sizes are None where config.json does not name them.

    Attributes:
        path: the folder, which may be missing: check `has_config`.
    """

    path: Path

    @classmethod
    def resolve(cls, name: str, files: Sequence[str] = MODEL_FILES) -> ModelFolder:
        """Find a model folder, or download a model from the hub.

        Args:
            name: folder or hub id.
            files: patterns of the files to download.

        Raises:
            ModelError: the folder is not a model, or the download failed.
        """
        folder = cls(Path(name))
        if folder.path.is_dir():
            if not folder.has_config:
                raise ModelError(f"model.path {name} has no {CONFIG_FILE}", "give the folder of a Hugging Face model")
            return cls(folder.path.resolve())

        if folder.path.is_absolute() or name.startswith("."):
            raise ModelError(
                f"model.path {name} does not exist", "give the folder of a Hugging Face model, or a hub id"
            )
        try:
            return cls(download(name, files))
        except OSError as exc:
            raise ModelError(
                f"model.path {name} is not a folder and could not be downloaded from the hub: {exc}",
                "give the folder of a Hugging Face model, or the id of a model that can be reached",
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
            ModelError: the file is missing or is not JSON.
        """
        file = self.path / CONFIG_FILE
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except OSError as exc:
            raise ModelError(f"{file} cannot be read: {exc}", "give the folder of a Hugging Face model") from exc
        except (ValueError, TypeError) as exc:
            raise ModelError(f"{file} is not a JSON object: {exc}", "save or download the model again") from exc

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's section; for a text-only model, all of config.json."""
        return self.config.get("text_config") or self.config

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

    def _size(self, key: str) -> int | None:
        size = self.text_config.get(key) or self.config.get(key)
        return int(size) if size else None


def load_image_processor(model_path: str) -> Any:
    """Load the image processor of a model folder or hub id.

    Raises:
        ModelError: it cannot be loaded, or Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401 - the processors of transformers need it, and name it late
        from transformers import AutoImageProcessor
    except ImportError as exc:
        raise ModelError(f"{model_path} takes images, and Pillow is not installed", "pip install pillow") from exc

    try:
        return AutoImageProcessor.from_pretrained(model_path)
    except (OSError, ValueError) as exc:
        raise ModelError(
            f"{model_path} takes images, but its image processor cannot be loaded: {exc}",
            "add the model's preprocessor_config.json",
        ) from exc


def download(hub_id: str, patterns: Sequence[str], *, repo_type: str = "model") -> Path:
    """Download a repository of the Hugging Face hub into the local cache, and return its folder.

    Args:
        patterns: files to fetch, as shell patterns.
        repo_type: "model" or "dataset".

    Raises:
        OSError: the download failed; its text is one line.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(hub_id, repo_type=repo_type, allow_patterns=list(patterns)))
    except (OSError, HFValidationError, httpx.HTTPError) as exc:
        lines = str(exc).strip().splitlines()
        raise OSError(lines[0] if lines else type(exc).__name__) from exc


def cached_file(hub_id: str, file: str) -> Path | None:
    """Return one file of a hub model if it was downloaded before. Downloads nothing."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def copy_tokenizer(model_path: str, folder: Path, chat_template: Path | None = None) -> None:
    """Copy the tokenizer of `model_path` into `folder`, byte for byte.

    Args:
        model_path: folder or hub id.
        chat_template: the template that was used instead of the tokenizer's.

    Raises:
        ModelError: there is no tokenizer, or the chat template was deleted.
    """
    source = Path(model_path)
    if not source.is_dir():
        try:
            source = download(model_path, (*TOKENIZER_FILES, "*.jinja"))
        except OSError as exc:
            raise ModelError(
                f"the tokenizer of {model_path} could not be downloaded from the hub: {exc}",
                "name a folder that holds it, or connect to the hub",
            ) from exc

    for file in source.iterdir():
        if file.name in TOKENIZER_FILES or file.suffix == ".jinja":
            shutil.copyfile(file, folder / file.name)

    if chat_template is not None:
        if not chat_template.is_file():
            raise ModelError(f"the chat template {chat_template} was deleted", "restore it: it belongs to the model")
        shutil.copyfile(chat_template, folder / TEMPLATE_FILE)


def check_target(out: Path, *, replace: bool, source: str, key: str) -> None:
    """Refuse an output folder that a finished model must not replace.

    Args:
        replace: allow replacing an earlier model; other contents are never replaced.
        source: path of the model that weights or tokenizer come from.
        key: the option or config key of the folder, for the message.

    Raises:
        ConfigError: the folder is in use.
    """
    if out.is_file():
        raise ConfigError(f"{key}: {out} is a file", "name a folder that does not exist yet")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if Path(source).is_dir() and out.samefile(source):
        raise ConfigError(f"{key}: {out} is the model that this one is made from", "name another folder")
    if not ModelFolder(out).has_config:
        raise ConfigError(f"{key}: {out} holds something other than a model", "name a folder that does not exist yet")
    if not replace:
        raise ConfigError(f"{key}: {out} already holds a model", "name another folder, or replace it with --force")
