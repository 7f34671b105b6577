"""transformers loads through one door, and a model's own code runs only if the user allows it."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import pytest

from agentloop.chat import load_tokenizer
from agentloop.errors import ModelError
from agentloop.model_folder import ModelFolder, code_warning
from agentloop.model_folder.pretrained import load_config
from agentloop.model_folder.tensors import compare
from tests.agentloop.model_folder.conftest import Copy

DOOR = ("pretrained.py", "tensors.py")
CODE = """
from pathlib import Path
from transformers import Qwen2Config
Path(__file__).with_name("ran").touch()
Path({mark!r}).touch()
class OwnConfig(Qwen2Config):
    model_type = "own"
"""


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]


def test_only_one_module_calls_transformers_loading(repo: Path) -> None:
    """Every call says whether the model's own code may run; none leaves it to a question on the terminal."""
    seen = 0
    for package in ("agentloop", "rollout_server", "trainer", "tools", "recipes"):
        for file in (repo / package).rglob("*.py"):
            tree = ast.parse(file.read_text())
            for call in _calls(tree):
                name, owner = call.func.attr, ast.unparse(call.func.value)
                if name != "from_pretrained" and not (name == "from_config" and "class" in owner):
                    continue
                seen += 1
                assert file.parent.name == "model_folder" and file.name in DOOR, f"{file}:{call.lineno}"
                assert "trust_remote_code" in {word.arg for word in call.keywords}, f"{file}:{call.lineno}"
            if file.parent.name != "model_folder":
                names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
                assert not {"AutoConfig", "AutoModelForCausalLM", "AutoModelForImageTextToText"} & names, file
    assert seen == 3


@pytest.fixture
def own(copied: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with code of its own, which leaves a mark when it runs; a "y" waits on stdin."""
    copied.config(model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (copied.path / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return copied.path


@pytest.mark.parametrize("load", [lambda p: load_config(str(p)), lambda p: compare(ModelFolder(p))])
def test_code_of_a_model_is_refused_with_the_key_that_allows_it(own: Path, tmp_path: Path, load: Any) -> None:
    with pytest.raises(ModelError, match=r"own\.OwnConfig.*not run(.|\n)*model\.trust_remote_code=true"):
        load(own)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_refused_too(copied: Copy, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied.path / name).unlink()
    (copied.path / "vocab.txt").write_text("a\n")
    (copied.path / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    (copied.path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", null]}}')
    copied.config(model_type="own")
    with pytest.raises(ModelError, match=r"model\.trust_remote_code"):
        load_tokenizer(str(copied.path))
    assert not (tmp_path / "ran").exists()


def test_the_key_allows_it_and_that_is_said(own: Path, tmp_path: Path) -> None:
    folder = ModelFolder(own)
    assert code_warning(folder, trust_remote_code=False) is None
    warning = code_warning(folder, trust_remote_code=True)
    assert warning is not None and "runs with your rights" in warning and "own.OwnConfig" in warning
    load_config(str(own), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_code_that_is_not_needed_is_not_run(copied: Copy, tmp_path: Path) -> None:
    """A published model may name its first code although transformers has its own by now."""
    copied.config(auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    (copied.path / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    compare(ModelFolder(copied.path))
    assert not (tmp_path / "ran").exists()
