"""What transformers finds in its files is remembered, as long as they are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCANNER = """
import os
SCANS = []
def define_import_structure(module_path, prefix=None):
    SCANS.append(prefix)
    folder = str(module_path).removesuffix("/__init__.py")
    found = {}
    for model in sorted(os.listdir(folder)):
        if os.path.isdir(f"{folder}/{model}") and model != "__pycache__":
            text = open(f"{folder}/{model}/modeling.py").read()
            found[f"{prefix}.{model}" if prefix else model] = set(text.split())
    return {frozenset({"torch"}): found, frozenset(): {}}
"""
PROGRAM = """
import json
from pathlib import Path
from agentloop.runtime.scan import remember_scans
remember_scans()
remember_scans()
from transformers.utils import import_utils
models = Path(import_utils.__file__).parents[1] / "models"
results = [import_utils.define_import_structure(models, prefix="models"),
           import_utils.define_import_structure(str(models / "__init__.py")),
           import_utils.define_import_structure(models / "b")]
fresh = [import_utils.define_import_structure.__wrapped__(models, "models"),
         import_utils.define_import_structure.__wrapped__(models), {frozenset({"torch"}): {}, frozenset(): {}}]
scans = import_utils.SCANS[:-2]
print(json.dumps([scans, results == fresh, sorted(results[1][frozenset({"torch"})].get("b", []))]))
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A package that scans its files as transformers does."""
    root = tmp_path / "packages"
    for name in ("utils", "models/a", "models/b"):
        (root / "transformers" / name).mkdir(parents=True)
        (root / "transformers" / name / "__init__.py").touch()
    (root / "transformers" / "__init__.py").touch()
    (root / "transformers" / "models" / "__init__.py").touch()
    (root / "transformers" / "utils" / "import_utils.py").write_text(SCANNER)
    (root / "transformers" / "models" / "a" / "modeling.py").write_text("A")
    (root / "transformers" / "models" / "b" / "modeling.py").write_text("B C")
    return root


def scans(packages: Path, cache: str) -> tuple[list[str | None], list[str]]:
    """Run a program that asks for the folder with and without prefix, and for one below it.

    Returns:
        the prefixes of the scans that it made, and the names of module b.
    """
    path = os.pathsep.join([str(packages), str(Path(__file__).resolve().parents[3])])
    environment = os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": cache}
    done = subprocess.run([sys.executable, "-P", "-c", PROGRAM], env=environment, capture_output=True, check=True)
    made, right, names = json.loads(done.stdout)
    assert right, "another result than that of a scan"
    return made, names


EVERY, BELOW = ["models", None, None], [None]
"""Scans of a program that remembers nothing, and of one that remembers the folder's."""


def test_files_that_are_the_same_are_scanned_once(packages: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    assert scans(packages, cache) == (EVERY, ["B", "C"])
    assert scans(packages, cache) == (BELOW, ["B", "C"])
    model = packages / "transformers" / "models" / "b" / "modeling.py"
    model.write_text("B D")  # of the same size
    assert scans(packages, cache) == (EVERY, ["B", "D"])
    (packages / "transformers" / "models" / "c").mkdir()
    (packages / "transformers" / "models" / "c" / "modeling.py").write_text("E")
    assert scans(packages, cache)[0] == EVERY
    with (packages / "transformers" / "utils" / "import_utils.py").open("a") as scanner:
        scanner.write("# another version\n")
    assert scans(packages, cache)[0] == EVERY
    assert scans(packages, cache) == (BELOW, ["B", "D"])
    assert len(list((tmp_path / "cache" / "agentloop").iterdir())) == 2  # the results of old files are replaced


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"digest": "x", "structure": []}', '{"digest": 1}', "\0\xff"])
def test_a_damaged_file_is_not_used(packages: Path, tmp_path: Path, damage: str) -> None:
    cache = str(tmp_path / "cache")
    scans(packages, cache)
    for file in (tmp_path / "cache" / "agentloop").iterdir():
        file.write_text(damage, encoding="latin-1")
    assert scans(packages, cache) == (EVERY, ["B", "C"])
    assert scans(packages, cache) == (BELOW, ["B", "C"])


def test_a_file_that_others_may_write_is_not_used(packages: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    scans(packages, cache)
    for file in (tmp_path / "cache" / "agentloop").iterdir():
        assert file.stat().st_mode & 0o777 == 0o600
        file.chmod(0o666)
    assert scans(packages, cache)[0] == EVERY


@pytest.mark.parametrize("cache", ["relative", "/dev/null"])
def test_without_a_folder_everything_is_scanned(packages: Path, cache: str) -> None:
    for _ in range(2):
        assert scans(packages, cache) == (EVERY, ["B", "C"])


def test_the_results_for_transformers_are_those_of_a_scan(tmp_path: Path) -> None:
    code = """
import sys
from agentloop.runtime.scan import remember_scans
remember_scans()
from transformers.utils import import_utils
scan = import_utils.define_import_structure
models = import_utils.__file__.replace("utils/import_utils.py", "models")
assert scan(models, "models") == scan.__wrapped__(models, "models")
assert scan(models + "/__init__.py") == scan.__wrapped__(models)
"""
    root = str(Path(__file__).resolve().parents[3])
    environment = os.environ | {"PYTHONPATH": root, "XDG_CACHE_HOME": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True)
    assert len(list((tmp_path / "agentloop").iterdir())) == 2
