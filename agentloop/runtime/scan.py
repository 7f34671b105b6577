"""Remember what transformers finds when it scans its own files.

Whenever it is imported, transformers reads its 2,600 files of model code, twice, to learn which
names they define: a quarter of the time of the import. `remember_scans` keeps the result in the
user's cache folder and uses it as long as the path, size and modification time of each file are
the same; so Python does with compiled modules. Whatever goes wrong, transformers scans.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

SCANNER, FUNCTION = "transformers.utils.import_utils", "define_import_structure"
FORMAT = 1
MAX_BYTES = 1 << 24

Structure = dict[frozenset[str], dict[str, set[str]]]
"""By needed packages, and by module: the names that it defines."""


def remember_scans() -> None:
    """Let the scans of this process be remembered, if it has not imported transformers yet."""
    if SCANNER not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the module that scans as usual, and puts the remembering function into it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != SCANNER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(loader := spec.loader, importlib.machinery.SourceFileLoader):
            execute = loader.exec_module

            def execute_and_replace(module: ModuleType) -> None:
                execute(module)
                if callable(scan := getattr(module, FUNCTION, None)):
                    setattr(module, FUNCTION, _remembering(scan, str(module.__file__)))

            loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


def _remembering(scan: Callable[..., Structure], scanner: str) -> Callable[..., Structure]:
    """Return `scan`, which remembers the results for transformers' folder of models.

    Args:
        scanner: file that defines `scan`.
    """
    models = Path(scanner).parents[1] / "models"

    @functools.wraps(scan)
    def remembered(module_path: Any, prefix: str | None = None) -> Structure:
        folder = Path(module_path)
        if folder not in (models, models / "__init__.py"):
            return scan(module_path, prefix)
        digest = _digest(models, Path(scanner))
        file = _cache_file(models, prefix)
        if digest is None or file is None:
            return scan(module_path, prefix)
        found = _read(file, digest)
        if found is None:
            found = scan(module_path, prefix)
            _write(file, digest, found)
        return found

    return remembered


@functools.cache
def _digest(models: Path, scanner: Path) -> str | None:
    """Digest path, size and modification time of all files below `models`, and of `scanner`."""
    import hashlib

    digest = hashlib.sha256(f"{FORMAT}\n{sys.version}\n".encode())
    folders, files = [str(models)], []
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir():
                        if entry.name != "__pycache__":
                            folders.append(entry.path)
                    else:
                        files.append((entry.path, entry.stat()))
        files.append((str(scanner), scanner.stat()))
    except OSError:
        return None
    for path, status in sorted(files, key=lambda file: file[0]):
        digest.update(f"{path}\n{status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _cache_file(models: Path, prefix: str | None) -> Path | None:
    """Return the file of a result: one for each installation, so that their number stays small."""
    import hashlib

    place = hashlib.sha256(f"{models}\n{prefix}".encode(errors="surrogateescape")).hexdigest()[:16]
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # there is no home
        return None
    return root / "agentloop" / f"transformers-{place}.json" if root.is_absolute() else None


def _read(file: Path, digest: str) -> Structure | None:
    """Return the result in a file of this user, if it was made from the same files."""
    import json

    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        status = file.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022 or status.st_size > MAX_BYTES:
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
        return _decoded(content["structure"]) if content["digest"] == digest else None
    return None


def _write(file: Path, digest: str, found: Structure) -> None:
    import json

    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        structure = [
            [sorted(packages), {module: sorted(names) for module, names in modules.items()}]
            for packages, modules in found.items()
        ]
        if _decoded(structure) != found:  # another version's results may be of another kind
            return
        text = json.dumps({"digest": digest, "structure": structure})
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        whole = file.with_name(f"{file.name}.{os.getpid()}")
        whole.write_text(text, encoding="utf-8")
        whole.chmod(0o600)
        whole.replace(file)


def _decoded(structure: list[Any]) -> Structure:
    return {
        frozenset(packages): {module: set(names) for module, names in modules.items()}
        for packages, modules in structure
    }
