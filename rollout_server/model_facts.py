"""What has to be known of a model to check requests for it, without loading it."""

from __future__ import annotations

from pathlib import Path

from agentloop.errors import ModelError
from agentloop.model_folder import CONFIG_FILE, ModelFolder, download
from rollout_server.engines.base import EngineInfo


def model_facts(engine: str, model: str, context_length: int | None) -> EngineInfo:
    """Vocabulary, context and whether there is a vision tower, from the model's config.json.

    Args:
        model: folder, or hub id.
        context_length: as asked for; None: what the model was made for.

    Raises:
        ModelError: there is no such config, or it does not say.
    """
    folder = ModelFolder(Path(model))
    if not folder.has_config:
        try:
            folder = ModelFolder(download(model, [CONFIG_FILE]))
        except OSError as exc:
            raise ModelError(f"the config.json of {model} could not be fetched: {exc}", "download the model") from exc
    vocab, longest = folder.vocab_size, folder.context_length or context_length
    if not vocab or not longest:
        raise ModelError(
            f"the config.json of {model} has no vocab_size or no max_position_embeddings", "give --context-length"
        )
    if context_length is not None and context_length > longest:
        raise ModelError(
            f"--context-length {context_length} is beyond the model's {longest}", f"give at most {longest}"
        )
    return EngineInfo(engine, model, context_length or longest, vocab, images=folder.takes_images)
