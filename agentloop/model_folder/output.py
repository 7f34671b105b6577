"""Write a model folder: copy the tokenizer, and protect what must not be replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

from agentloop.errors import ConfigError, ModelError
from agentloop.files import disk_errors
from agentloop.model_folder.folder import TEMPLATE_FILE, TOKENIZER_FILES, ModelFolder


def copy_tokenizer(model_path: str, folder: Path, chat_template: Path | None = None) -> None:
    """Copy the tokenizer of `model_path` into `folder`, byte for byte.

    Args:
        model_path: folder or hub id.
        chat_template: the template that was used instead of the tokenizer's.

    Raises:
        ModelError: there is no tokenizer, or the chat template was deleted.
        DiskError: the disk is full.
    """
    source = ModelFolder.find(model_path, (*TOKENIZER_FILES, "*.jinja"), key="the tokenizer of").path
    for file in source.iterdir():
        if file.name in TOKENIZER_FILES or file.suffix == ".jinja":
            with disk_errors(folder / file.name):
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
