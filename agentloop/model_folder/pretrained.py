"""The one door to transformers' loading: errors are typed, and a model's own code never runs
unasked.

A model folder may bring Python code (`auto_map`). transformers runs it on `trust_remote_code=True`,
and asks on the terminal if that is not said. Here it is always said: false, unless
`model.trust_remote_code` is true. No module but this and `tensors` calls `from_pretrained`.

transformers, and with it torch, is imported when a function is called.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentloop.errors import ModelError
from agentloop.model_folder.files import read_json
from agentloop.model_folder.folder import VISION_TYPES, ModelFolder

log = logging.getLogger(__name__)

TRUST_KEY = "model.trust_remote_code"
TRUST_FIX = f"read that code; if you trust it, set {TRUST_KEY}=true (agentloop serve: --trust-remote-code)"

LONGEST_REASON = 200

CODE_MAP = "auto_map"
"""Key of the JSON files that names a folder's own classes."""


def load_pretrained(loader: Any, path: str, what: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Call `loader.from_pretrained` on a folder or hub id.

    Args:
        loader: a class of transformers.
        what: what is loaded, for messages: "the tokenizer".

    Raises:
        ModelError: whatever the reason; the model's own code is needed and not allowed, or a file
            is missing or wrong.
    """
    with typed_errors(path, what):
        return loader.from_pretrained(path, trust_remote_code=trust_remote_code, **options)


def load_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """Read the config of a model folder or hub id as transformers' object.

    Raises:
        ModelError: there is none, transformers does not know its model type, or a value is wrong.
    """
    from transformers import AutoConfig

    return load_pretrained(AutoConfig, path, "the model's config.json", trust_remote_code=trust_remote_code)


def model_class(config: Any) -> Any:
    """The Auto class that builds a model of `config`: with its vision tower, or a causal LM."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if config.model_type in VISION_TYPES else AutoModelForCausalLM


def build_model(config: Any, path: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Build a model of `config` on torch's current device, with values that mean nothing.

    Args:
        path: where `config` comes from, for messages.

    Raises:
        ModelError: it is not a causal language model, or a value of its config is wrong.
    """
    with typed_errors(path, "a causal language model"):
        return model_class(config).from_config(config, trust_remote_code=trust_remote_code, **options)


@contextlib.contextmanager
def typed_errors(path: str, what: str) -> Iterator[None]:
    """Turn any exception of transformers into a ModelError that names the path.

    transformers documents no set of exceptions: a wrong value in a foreign config.json may raise
    anything, from KeyError to ZeroDivisionError.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as exc:
        if "trust_remote_code" in str(exc):
            raise needs_code(path) from exc
        raise ModelError(
            f"{path} cannot be loaded: {what}: {_reason(exc)}",
            "compare its files with the published model's, or update transformers if the model is newer than it",
        ) from exc


def needs_code(path: str) -> ModelError:
    """The error for a model that transformers can load only with the model's own code."""
    return ModelError(
        f"{path} needs Python code of its own ({code_of(ModelFolder(Path(path))) or CODE_MAP}), which is not run: "
        f"{TRUST_KEY} is false",
        TRUST_FIX + ", or use a model that transformers knows",
    )


def code_of(folder: ModelFolder) -> str:
    """Name the code that a folder brings: `config.json: AutoConfig = x.Y, ...`; else empty."""
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder.path / name).is_file() and (classes := read_json(folder.path / name).get(CODE_MAP)):
            pairs = classes.items() if isinstance(classes, dict) else [(CODE_MAP, classes)]
            return f"{name}: " + ", ".join(f"{key} = {value}" for key, value in pairs)
    return ""


def code_warning(folder: ModelFolder, *, trust_remote_code: bool) -> str | None:
    """The warning that a folder's own code runs; None if it does not."""
    code = code_of(folder) if trust_remote_code else ""
    return f"{TRUST_KEY} is true: Python code of {folder.path} runs with your rights ({code})" if code else None


def load_image_processor(model_path: str, *, trust_remote_code: bool = False) -> Any:
    """Load the image processor of a model folder or hub id.

    Raises:
        ModelError: it cannot be loaded, or Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401 - the processors of transformers need it, and name it late
        from transformers import AutoImageProcessor
    except ImportError as exc:
        raise ModelError(f"{model_path} takes images, and Pillow is not installed", "pip install pillow") from exc

    what = "the image processor (preprocessor_config.json), because the model takes images"
    return load_pretrained(AutoImageProcessor, model_path, what, trust_remote_code=trust_remote_code)


def _reason(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    if not lines:
        return type(exc).__name__
    # Of advice as long as a paragraph, the first sentence names the fault.
    text = lines[0] if len(lines[0]) <= LONGEST_REASON else lines[0].partition(". ")[0]
    return f"{type(exc).__name__}: {text}"
