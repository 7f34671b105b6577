"""`import agentloop` is cheap: what is heavy is loaded when it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import agentloop


def test_import_loads_no_heavy_package() -> None:
    code = (
        "import sys, agentloop; "
        "print([m for m in ('torch', 'fastapi', 'ray', 'transformers', 'uvicorn', 'sglang') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name in agentloop.__all__ if not name.startswith("_")])
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(agentloop, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        agentloop.no_such_name  # noqa: B018
