"""Read the server's settings from a JSON file, from command-line options, or from both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from agentloop.config.loading import validate
from agentloop.config.server import ServerSettings
from agentloop.errors import ConfigError, ModelError
from agentloop.model_folder import ModelFolder

SettingsT = TypeVar("SettingsT", bound=ServerSettings)


def load_settings(model: type[SettingsT], file: Path | None, options: dict[str, Any]) -> SettingsT:
    """Return the settings of `file`; `options` override its values.

    Args:
        model: the class of the settings.
        file: JSON object of `ServerSettings` fields, as `ServerSettings.save` writes it; None:
            options only.
        options: values given on the command line, by field.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the nearest known key is named) or a
            value is wrong.
    """
    if file is not None:
        values = {**_read(file), **options}
        return validate(model, values, source=str(file), hint="`agentloop serve --help` lists the options")

    try:
        return model(**options)
    except ValidationError as exc:
        first = exc.errors()[0]
        name = model.option(str(first["loc"][0]))
        message = f"{name} is missing" if first["type"] == "missing" else f"{name}: {first['msg']}"
        raise ConfigError(message, "see agentloop serve --help") from None


def check_model(path: str) -> None:
    """Refuse a path that cannot be a model; engines find other faults when they load it.

    Raises:
        ModelError: it is neither a model folder nor a hub id.
    """
    folder = Path(path)
    if folder.exists() and not ModelFolder(folder).has_config:
        raise ModelError(f"{path} has no config.json", "give a folder with config.json and safetensors")
    if not folder.exists() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise ModelError(f"there is no model at {path}", "give a folder with config.json and safetensors, or a hub id")


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"settings file {file} cannot be read: {exc}", "give a JSON file of server settings") from exc
    if not isinstance(values, dict):
        raise ConfigError(f"settings file {file} does not contain a JSON object", "give a JSON file of server settings")
    return values
