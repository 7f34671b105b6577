"""Compare the tensors in a model's files with those of its architecture, by name and shape.

The architecture is built on torch's `meta` device, and the headers of the files stand for the
files: nothing is read or allocated, however large the model. transformers itself decides what fits
(renamed, fused, tied and ignored tensors): it loads a dictionary of tensors on `meta`.

`compare` needs torch. A process without it runs `python -m agentloop.model_folder.tensors`, through
`agentloop.model_folder.check.check_tensors`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agentloop.errors import ModelError
from agentloop.model_folder.files import StoredTensor
from agentloop.model_folder.folder import ModelFolder
from agentloop.model_folder.pretrained import build_model, load_config, typed_errors

NAMED = 3
"""Tensors that a message names; the others are counted."""


def compare(folder: ModelFolder, *, trust_remote_code: bool = False) -> None:
    """Check that the files of a model hold exactly the tensors of its architecture.

    Raises:
        ModelError: a tensor is missing, unexpected, or of another shape or kind; or the config does
            not describe a causal language model.
    """
    import torch

    config = load_config(str(folder.path), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        lm = build_model(config, str(folder.path), trust_remote_code=trust_remote_code)
    compare_with(lm, folder)


def compare_with(lm: Any, folder: ModelFolder) -> None:
    """Compare the tensors of files with those of a model on `meta`, which is not changed.

    Raises:
        ModelError: as `compare`.
    """
    import torch

    tensors = folder.weights
    persistent = lm.state_dict().keys()
    own = dict(lm.named_parameters()) | {name: buffer for name, buffer in lm.named_buffers() if name in persistent}
    stored = {name: tensor.spec.shape for name, tensor in tensors.items()}
    if stored != {name: tuple(tensor.shape) for name, tensor in own.items()}:
        state = {
            name: torch.empty(tensor.spec.shape, dtype=getattr(torch, tensor.spec.dtype), device="meta")
            for name, tensor in tensors.items()
        }
        with typed_errors(str(folder.path), "its tensors"), _quiet():
            _, info = type(lm).from_pretrained(
                None,
                config=lm.config,
                state_dict=state,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )
        refuse(info, folder)

    # transformers casts whatever it finds: integers would become numbers that mean nothing.
    wrong = [n for n, t in own.items() if n in tensors and t.is_floating_point() and not _is_float(tensors[n])]
    if wrong:
        raise _error(folder, "hold integers in place of weights", wrong)


def refuse(info: Mapping[str, Any], folder: ModelFolder) -> None:
    """Refuse what transformers reports about a loading (`output_loading_info`), if it is not whole.

    Raises:
        ModelError: names missing, unexpected and wrong-shaped tensors.
    """
    if info["mismatched_keys"]:
        shapes = [f"{n} ({list(file)}, the model's: {list(own)})" for n, file, own in sorted(info["mismatched_keys"])]
        raise _error(folder, "have tensors of another shape than config.json says", shapes)
    if info["missing_keys"]:
        raise _error(folder, "lack tensors of the model", info["missing_keys"])
    if info["unexpected_keys"]:
        raise _error(folder, "hold tensors that the model of config.json does not have", info["unexpected_keys"])
    if info.get("error_msgs"):
        raise _error(folder, "cannot be converted to the model's tensors", map(str, info["error_msgs"]))


def refuse_nonfinite(tensor: Any, name: str, path: str) -> None:
    """Refuse a tensor with NaN or infinite values. Reads it once, and copies nothing.

    Args:
        tensor: of torch, on any device but meta.
        name: its name in the files of `path`, for the message.

    Raises:
        ModelError: it has such a value.
    """
    if not tensor.is_floating_point() or _is_finite(tensor):
        return
    raise ModelError(
        f"the weights in {path} hold NaN or infinite values: {name}",
        "the model was damaged in training or in conversion: use another checkpoint of it",
    )


def _is_finite(tensor: Any) -> bool:
    import torch

    # One NaN or infinity makes the sum one too; only an overflow needs the slower test.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _is_float(tensor: StoredTensor) -> bool:
    return "float" in tensor.spec.dtype


def _error(folder: ModelFolder, what: str, names: Iterable[str]) -> ModelError:
    ordered = sorted(names)
    more = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return ModelError(
        f"the weights in {folder.path} {what}: {', '.join(ordered[:NAMED])}{more}",
        "download or save the model again; config.json and weights must be of one model",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bar and load report off the terminal: `refuse` says more."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def main(arguments: list[str]) -> int:
    """Compare the folder `arguments[0]`, and print `{}` or `{message, hint}` as JSON."""
    path, *options = arguments
    answer: dict[str, str | None] = {}
    try:
        compare(ModelFolder(Path(path)), trust_remote_code="--trust-remote-code" in options)
    except ModelError as exc:
        answer = {"message": exc.message, "hint": exc.hint}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
