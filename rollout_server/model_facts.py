"""What has to be known of a model to check requests for it, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

from agentloop.errors import ModelError
from rollout_server.engines.base import EngineInfo


def model_facts(engine: str, model: str, context_length: int | None) -> EngineInfo:
    """Vocabulary, context and whether there is a vision tower, from the model's config.json.

    Args:
        model: folder, or hub id.
        context_length: as asked for; None: what the model was made for.

    Raises:
        ModelError: there is no such config, or it does not say.
    """
    file = Path(model) / "config.json"
    if not file.is_file():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(model, "config.json"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as exc:
            raise ModelError(f"{model} has no config.json that can be fetched: {exc}", "download the model") from exc
    try:
        config = json.loads(file.read_text())
    except ValueError as exc:
        raise ModelError(f"{file} is no JSON: {exc}", "save the model again") from exc
    text = config.get("text_config") or config
    vocab = text.get("vocab_size") or config.get("vocab_size")
    longest = text.get("max_position_embeddings") or config.get("max_position_embeddings") or context_length
    if not vocab or not longest:
        raise ModelError(f"{file} does not say vocab_size and max_position_embeddings", "give --context-length")
    if context_length is not None and context_length > longest:
        raise ModelError(
            f"--context-length {context_length} is beyond the model's {longest}", f"give at most {longest}"
        )
    return EngineInfo(engine, model, int(context_length or longest), int(vocab), images="vision_config" in config)
