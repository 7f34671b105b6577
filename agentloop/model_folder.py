"""A model's folder in the Hugging Face layout: where it is, and its files beside the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from agentloop.errors import ConfigError, ModelError

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
"""What tokenizers and the processors of images save under. Chat templates (`*.jinja`) come beside them."""

TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers looks for a chat template first."""


def resolve_model(path: str) -> str:
    """The local folder of a model: `path` itself, or the downloaded snapshot of a hub id.

    Raises:
        ModelError: neither is there.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path {path} holds no config.json", "give the folder of a Hugging Face model")
        return str(folder.resolve())
    if folder.is_absolute() or path.startswith("."):
        raise ModelError(f"model.path {path} does not exist", "give the folder of a Hugging Face model, or a hub id")
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return str(snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError, httpx.HTTPError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ModelError(
            f"model.path {path} is no folder and cannot be downloaded from the hub: {reason}",
            "give the folder of a Hugging Face model, or the id of a model that can be reached",
        ) from exc


def copy_tokenizer(model_path: str, folder: Path, chat_template: Path | None = None) -> None:
    """Put the tokenizer of `model_path` into `folder`, byte for byte.

    Args:
        model_path: folder or hub id.
        chat_template: what was used instead of the tokenizer's own.

    Raises:
        ModelError: there is no tokenizer, or the chat template is gone.
    """
    source = Path(model_path) if Path(model_path).is_dir() else _downloaded(model_path)
    for file in source.iterdir():
        if file.name in TOKENIZER_FILES or file.suffix == ".jinja":
            shutil.copyfile(file, folder / file.name)
    if chat_template is not None:
        if not chat_template.is_file():
            raise ModelError(f"the chat template {chat_template} is gone", "put it back: it belongs to the model")
        shutil.copyfile(chat_template, folder / TEMPLATE_FILE)


def _downloaded(hub_id: str) -> Path:
    """The folder of a hub id with its tokenizer's files, which are fetched where they are not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*TOKENIZER_FILES, "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as exc:
        reason = next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise ModelError(
            f"the tokenizer of {hub_id} cannot be had: {reason}", "name a folder that holds it, or connect to the hub"
        ) from exc


def check_target(out: Path, *, replace: bool, source: str, key: str) -> None:
    """Refuse a folder that a finished model must not replace.

    Args:
        replace: whether an earlier model there may be replaced; nothing else ever is.
        source: path of the model that weights or tokenizer come from.
        key: what names the folder, for the message.

    Raises:
        ConfigError: it is in use.
    """
    if out.is_file():
        raise ConfigError(f"{key}: {out} is a file", "name a folder that does not exist yet")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if Path(source).is_dir() and out.samefile(source):
        raise ConfigError(f"{key}: {out} is the model that this one comes from", "name another folder")
    if not (out / "config.json").is_file():
        raise ConfigError(f"{key}: {out} holds something else than a model", "name a folder that does not exist yet")
    if not replace:
        raise ConfigError(f"{key}: {out} holds a model already", "name another folder, or replace it with --force")
