"""Read the server's settings from a JSON file, from command-line options, or from both."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from agentloop.config.loading import validate
from agentloop.config.messages import explain, value_fault
from agentloop.config.server import ServerSettings
from agentloop.errors import ConfigError
from agentloop.imports import MAX_BYTES

log = logging.getLogger("rollout_server")

HINT = "give a JSON file of server settings"

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

    fault = value_fault(options)
    if fault is not None:
        raise ConfigError(fault, "see agentloop serve --help")
    try:
        return model(**options)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        field = str(first["loc"][0])
        name = model.option(field)
        if first["type"] == "missing":
            raise ConfigError(f"{name} is missing", "see agentloop serve --help") from None
        text = explain(first, [], model).removeprefix(field).lstrip(".0123456789")
        raise ConfigError(name + text, "see agentloop serve --help") from None


def check_model(settings: ServerSettings) -> None:
    """Refuse a model that cannot be served, before an engine starts; download one of the hub.

    Raises:
        ModelError: it is neither a model folder nor a hub id, or its files cannot be served.
    """
    # Here, because numpy comes with it, and `agentloop --help` imports this module.
    from agentloop.model_folder import CONFIG_FILE, ModelFolder, check_tensors, find_model

    if settings.replica_urls or settings.engine not in ("torch", "sglang"):
        ModelFolder.resolve(settings.model, [CONFIG_FILE], key="--model")
        return
    trust, sglang = settings.trust_remote_code, settings.engine == "sglang"
    folder = find_model(settings.model, log.warning, trust_remote_code=trust, quantized=sglang, key="--model")
    if sglang and folder.quantization is None:
        # SGLang serves a tensor that no file holds with whatever the memory contained.
        check_tensors(folder, trust_remote_code=trust)


def _read(file: Path) -> dict[str, Any]:
    try:
        if not file.is_file():
            raise ConfigError(f"settings file {file} is not an existing file", HINT)
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(f"settings file {file} has more than {MAX_BYTES >> 20} MB", HINT)
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"settings file {file} cannot be read: {exc}", HINT) from exc
    except RecursionError as exc:
        raise ConfigError(f"settings file {file} is nested too deep", HINT) from exc
    if not isinstance(values, dict):
        raise ConfigError(f"settings file {file} does not contain a JSON object", HINT)
    return values
