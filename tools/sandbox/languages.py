"""The languages that programs may be in: their names, their file, and how they are run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Language:
    """One language.

    Attributes:
        name: as it is listed.
        file: name of the program's file.
        command: what runs it; empty: the interpreter that waits already.
        compiler: what compiles it first; empty: nothing.
        reserves: it reserves address space without using it, so that only used memory is limited.
    """

    name: str
    file: str
    command: tuple[str, ...] = ()
    compiler: tuple[str, ...] = ()
    reserves: bool = False

    @property
    def program(self) -> str:
        """The executable that has to be there."""
        return (self.compiler or self.command or ("",))[0]


PYTHON = Language("python", "main.py")

LANGUAGES = (
    PYTHON,
    Language("bash", "main.sh", ("/bin/bash", "main.sh")),
    Language("cpp", "main.cpp", ("./main",), ("/usr/bin/g++", "-O2", "-std=c++17", "-o", "main", "main.cpp")),
    Language("javascript", "main.js", ("/usr/bin/node", "main.js"), reserves=True),
)

ALIASES = {"python3": "python", "py": "python", "sh": "bash", "c++": "cpp", "nodejs": "javascript", "js": "javascript"}
"""Further names; `cpp` and `nodejs` are those of Sandbox Fusion."""


def installed() -> Mapping[str, Language]:
    """Return the languages that this machine can run, by each of their names."""
    found = {
        language.name: language for language in LANGUAGES if not language.program or shutil.which(language.program)
    }
    return found | {alias: found[name] for alias, name in ALIASES.items() if name in found}
