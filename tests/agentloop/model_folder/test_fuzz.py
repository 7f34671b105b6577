"""Whatever is in a model folder, a check of it ends in success or in an error that names the fault.

AGENTLOOP_FUZZ_EXAMPLES sets the number of damaged folders.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from agentloop.chat import load_tokenizer
from agentloop.errors import ModelError
from agentloop.model_folder import ModelFolder, check_files
from agentloop.model_folder.tensors import compare

EXAMPLES = int(os.environ.get("AGENTLOOP_FUZZ_EXAMPLES", "200"))

KEYS = (
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "dtype",
    "rope_parameters", "rope_scaling", "sliding_window", "use_sliding_window", "hidden_act", "text_config", "auto_map",
    "vision_config", "quantization_config", "transformers_weights", "eos_token_id", "pad_token_id", "torch_dtype",
    "rms_norm_eps", "initializer_range", "attn_implementation", "_attn_implementation", "is_decoder", "id2label",
    "_name_or_path", "tokenizer_class", "transformers_version", "use_cache", "bos_token_id", "attention_dropout",
)  # fmt: skip
TYPES = ("qwen2", "qwen3", "llama", "gpt2", "bert", "t5", "clip", "foo", "", "qwen2_vl", "mixtral", "mistral", "../x")
ENTRY = ("shape", "dtype", "data_offsets", "name", "entry")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 600)
    | st.sampled_from([2**31, 2**40, 10**30, -(2**63), 0.5, 1e308, "float32", "fp8", "x.safetensors", *TYPES])
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=4,
)
SEEDS = st.integers(0, 2**32)
SPOTS = st.floats(0, 1)

Damage = Callable[[Path], None]


def in_json(name: str, key: str, value: Any, remove: bool) -> Damage:
    """Change or remove a key of a JSON file, wherever it is in it."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        if remove:
            data.pop(key, None)
        else:
            data[key] = value
        own(folder, name).write_text(json.dumps(data))

    return damage


def somewhere_in_json(name: str, seed: int, value: Any) -> Damage:
    """Replace a value at any depth of a JSON file."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        node, rng = data, random.Random(seed)
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            if rng.random() < 0.3 or not isinstance(node[key], dict | list) or not node[key]:
                node[key] = value
                break
            node = node[key]
        own(folder, name).write_text(json.dumps(data))

    return damage


def in_header(tensor: int, key: str, value: Any) -> Damage:
    """Change the entry of a tensor in the header of the weights, or its name."""

    def damage(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        name = sorted(header)[tensor % len(header)]
        entry = header[name]
        if key == "name":
            header[str(value)] = header.pop(name)
        elif key == "entry":
            header[name] = value
        else:
            entry[key] = value
        text = json.dumps(header).encode()
        own(folder, "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return damage


def bytes_in(name: str, spot: float, new: bytes, header: bool) -> Damage:
    """Overwrite bytes: anywhere, or in the header of the weights."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        at = int(spot * min(len(data), 3000 if header else len(data)))
        data[at : at + len(new)] = new
        own(folder, name).write_bytes(bytes(data))

    return damage


def cut(name: str, spot: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        own(folder, name).write_bytes(data[: int(spot * len(data))])

    return damage


def swap(one: str, two: str) -> Damage:
    def damage(folder: Path) -> None:
        a, b = (folder / one).read_bytes(), (folder / two).read_bytes()
        own(folder, one).write_bytes(b)
        own(folder, two).write_bytes(a)

    return damage


def replace(name: str, what: str) -> Damage:
    """Put something else in the place of a file."""

    def damage(folder: Path) -> None:
        file = folder / name
        file.unlink(missing_ok=True)
        if what == "folder":
            file.mkdir()
        elif what == "loop":
            file.symlink_to(file)
        elif what == "empty":
            file.touch()
        elif what == "pointer":
            file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")

    return damage


def index(mapping: Any) -> Damage:
    """Add an index, with the weights in place or without them."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(mapping))

    return damage


def own(folder: Path, name: str) -> Path:
    """Make a file the folder's own, not a link to the original."""
    (folder / name).unlink(missing_ok=True)
    return folder / name


NAMES = st.sampled_from(FILES)
JSONS = st.sampled_from([name for name in FILES if name.endswith(".json")])
DAMAGE = st.one_of(
    st.builds(in_json, st.just("config.json"), st.sampled_from(KEYS), VALUES, st.booleans()),
    st.builds(in_json, st.just("config.json"), st.just("model_type"), st.sampled_from(TYPES), st.just(False)),
    st.builds(somewhere_in_json, JSONS, SEEDS, VALUES),
    st.builds(in_header, st.integers(0, 30), st.sampled_from(ENTRY), VALUES),
    st.builds(bytes_in, st.just("model.safetensors"), SPOTS, st.binary(min_size=1, max_size=9), st.just(True)),
    st.builds(bytes_in, NAMES, SPOTS, st.binary(min_size=1, max_size=9), st.just(False)),
    st.builds(cut, NAMES, SPOTS),
    st.builds(swap, NAMES, NAMES),
    st.builds(replace, NAMES, st.sampled_from(["nothing", "folder", "loop", "empty", "pointer"])),
    st.builds(index, VALUES | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=5), VALUES)})),
)  # fmt: skip


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="AGENTLOOP_FUZZ_EXAMPLES" not in os.environ,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(damages=st.lists(DAMAGE, min_size=1, max_size=3))
def test_a_damaged_model_folder_is_loaded_or_named(
    damages: list[Damage], scratch: Path, quickstart_model: Path
) -> None:
    folder = scratch / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in quickstart_model.iterdir():
        (folder / file.name).symlink_to(file)
    for damage in damages:
        try:
            damage(folder)
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # an earlier one left nothing that this one could change

    for step in (_files, _tensors, _tokenizer):
        try:
            step(folder)
        except ModelError as exc:
            assert exc.message and exc.hint, exc
            assert "\n" not in exc.message, exc


def _files(folder: Path) -> None:
    check_files(ModelFolder.resolve(str(folder)))


def _tensors(folder: Path) -> None:
    check_files(ModelFolder.resolve(str(folder)))
    compare(ModelFolder.resolve(str(folder)))


def _tokenizer(folder: Path) -> None:
    load_tokenizer(str(folder))
