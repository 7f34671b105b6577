"""What a machine runs the processes with: any change of code or packages shows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentloop.launch import fingerprint
from agentloop.launch.fingerprint import PACKAGES

Install = Callable[[str, str, str], None]


def test_it_names_the_interpreter_the_packages_and_the_code() -> None:
    found = fingerprint.fingerprint()
    assert found["executable"] == sys.executable
    assert found["torch"] != "-" and found["numpy"] != "-"
    assert all(len(found[f"code of {package}"]) == 16 for package in PACKAGES)


def test_a_bare_interpreter_can_run_it() -> None:
    """It is sent as text to nodes that may have nothing but Python."""
    program = Path(fingerprint.__file__).read_text()
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["torch"] == "-" and found["code of agentloop"] == "-"


def test_a_changed_file_of_code_changes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "changing"
    package.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for name, content in (("__init__.py", "a = 1"), ("__init__.py", "a = 2"), ("more.yaml", "a: 2"), ("x.yaml", "")):
        (package / name).write_text(content)
        hashes.append(fingerprint._code("changing"))
    assert len(set(hashes)) == 4 and "-" not in hashes
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "more.pyc").write_bytes(b"compiled")
    assert fingerprint._code("changing") == hashes[-1]


def test_packages_that_users_register_belong_to_it(install: Install) -> None:
    before = fingerprint.fingerprint()
    install(
        "own_reward", "def score(row, text, trajectory): return 1.0", "[agentloop.rewards]\nown = own_reward:score\n"
    )
    after = fingerprint.fingerprint()
    assert after.keys() - before.keys() == {"code of own_reward"}
    assert after["code of own_reward"] != "-"
