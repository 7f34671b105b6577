"""The files of a Hugging Face folder beside its weights, and putting a finished folder in its place. No torch."""

from __future__ import annotations

import os
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


def copy_tokenizer(model_path: str, folder: Path, chat_template: Path | None = None) -> None:
    """Put the tokenizer of `model_path` into `folder`: byte for byte where it comes from a folder.

    Args:
        model_path: folder or hub id.
        chat_template: what was used instead of the tokenizer's own.

    Raises:
        ModelError: there is no tokenizer, or the chat template is gone.
    """
    source = Path(model_path)
    if source.is_dir():
        for file in source.iterdir():
            if file.name in TOKENIZER_FILES or file.suffix == ".jinja":
                shutil.copyfile(file, folder / file.name)
    else:
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
        except (OSError, ValueError) as exc:
            raise ModelError(
                f"{model_path} has no tokenizer that can be loaded: {exc}", "check the model path"
            ) from exc
    if chat_template is not None:
        if not chat_template.is_file():
            raise ModelError(f"the chat template {chat_template} is gone", "put it back: it belongs to the model")
        shutil.copyfile(chat_template, folder / TEMPLATE_FILE)


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


def partial_of(folder: Path) -> Path:
    """Where a folder is written before it gets its name: beside it, so that renaming is one step."""
    return folder.with_name(f".{folder.name}.partial")


def rename_folder(partial: Path, folder: Path) -> None:
    """Move a finished folder to its name; one that stands there is replaced."""
    if folder.exists():
        stale = folder.with_name(f".{folder.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        os.rename(folder, stale)  # noqa: PTH104
        os.rename(partial, folder)  # noqa: PTH104
        shutil.rmtree(stale)
    else:
        os.rename(partial, folder)  # noqa: PTH104
