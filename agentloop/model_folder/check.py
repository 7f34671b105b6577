"""Check a model folder before anything is started. Loads no tensor, and needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from agentloop.errors import ModelError
from agentloop.model_folder.files import read_json
from agentloop.model_folder.folder import CONFIG_FILE, ModelFolder, refuse_adapter
from agentloop.model_folder.pretrained import code_warning

COMPARE_TIMEOUT_S = 600.0

SETTINGS_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")

DEPTH_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
"""Keys of config.json that count layers."""


def find_model(
    name: str,
    warn: Callable[[str], object],
    *,
    trust_remote_code: bool,
    weights: bool = True,
    quantized: bool = False,
    key: str = "model.path",
) -> ModelFolder:
    """Find a model and check its files; download one of the hub.

    Args:
        name: folder or hub id.
        warn: called with the warning that the model's own code runs.
        weights, quantized: as `check_files`.
        key: the setting that names it, for messages.

    Raises:
        ModelError: as `ModelFolder.resolve` and `check_files`.
    """
    folder = ModelFolder.resolve(name, key=key, code=trust_remote_code)
    check_files(folder, weights=weights, quantized=quantized)
    if warning := code_warning(folder, trust_remote_code=trust_remote_code):
        warn(warning)
    return folder


def check_files(folder: ModelFolder, *, weights: bool = True, quantized: bool = False) -> None:
    """Check the files of a model by their headers: milliseconds, for a model of any size.

    Args:
        weights: False: config.json alone, for a model whose weights are drawn or are elsewhere.
        quantized: whether a quantized checkpoint can be used.

    Raises:
        ModelError: names the file or tensor: config.json is broken or names no model type; the
            checkpoint is quantized; there are no safetensors; a file is missing, damaged, cut or a
            Git LFS pointer; an adapter lies beside the model.
    """
    if not isinstance(folder.model_type, str):
        raise ModelError(f"{folder.path / CONFIG_FILE} names no model_type", "give the folder of a Hugging Face model")
    if folder.quantization is not None and not quantized:
        raise ModelError(
            f"the checkpoint {folder.path} is quantized ({folder.quantization}), and the trainer and the torch engine "
            "compute with plain weights",
            "use the model's unquantized checkpoint, or serve this one with --engine sglang",
        )
    _ = folder.vocab_size, folder.hidden_size, folder.context_length
    for name in SETTINGS_FILES:
        if (folder.path / name).is_file():
            read_json(folder.path / name)  # transformers would go on without a broken one, in silence
    if weights:
        refuse_adapter(folder.path)
        _refuse_depth(folder, len(folder.weights))


def _refuse_depth(folder: ModelFolder, tensors: int) -> None:
    """Refuse more layers than there are tensors: building them could take for ever."""
    for section in (folder.config, folder.text_config, folder.config.get("vision_config")):
        for key in DEPTH_KEYS:
            layers = section.get(key) if isinstance(section, dict) else None
            if isinstance(layers, int) and layers > tensors:
                raise ModelError(
                    f"{folder.path / CONFIG_FILE} says {key} {layers}, but the files hold only {tensors} tensors",
                    "use the config.json that was published with the weights",
                )


def check_tensors(folder: ModelFolder, *, trust_remote_code: bool = False) -> None:
    """Compare the tensors in the files with the architecture of config.json, by name and shape.

    Runs `tensors.compare` in a child process, because this one may not import torch; it takes the
    seconds that the import takes. Trainer and server compare again when they load the model.

    Raises:
        ModelError: names the tensors; or the child failed.
    """
    command = [sys.executable, "-P", "-m", "agentloop.model_folder.tensors", str(folder.path)]
    if trust_remote_code:
        command.append("--trust-remote-code")
    # The child must import the agentloop that started it.
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=COMPARE_TIMEOUT_S, env={**os.environ, "PYTHONPATH": paths}, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as exc:
        raise ModelError(
            f"the architecture of {folder.path} could not be built in {COMPARE_TIMEOUT_S:.0f} s",
            "check the sizes in its config.json",
        ) from exc
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ModelError(
            f"the tensors of {folder.path} could not be compared with its architecture: {last}",
            "run `python -c 'import torch, transformers'` to see whether both can be imported",
        ) from None
    if answer:
        raise ModelError(answer["message"], answer["hint"])
