"""Fields of SGLang's requests that this server does not support: some are ignored, others refused.

docs/rollout_server.md shows the same tables; a test compares them. Any other unknown field is a
400.
"""

from __future__ import annotations

from typing import Any

GENERATE_IGNORED: dict[str, str] = {
    "log_metrics": "all requests are counted",
    "no_logs": "requests are never logged",
    "return_text_in_logprobs": "answers hold no text",
    "priority": "requests are served in order",
    "routing_key": "X-Session-Id decides the replica",
    "routed_dp_rank": "X-Session-Id decides the replica",
    "data_parallel_rank": "X-Session-Id decides the replica",
    "disagg_prefill_dp_rank": "X-Session-Id decides the replica",
    "conversation_id": "it only names the request",
    "custom_labels": "metrics have no client labels",
    "external_trace_header": "requests are not traced here",
    "received_time": "it only feeds metrics",
    "extra_key": "prefixes are shared by all requests",
    "modalities": "the data determines it",
    "mm_hashes": "images are hashed here",
    "mm_content_hashes": "images are hashed here",
}
"""Ignored fields, with the reason: the sampled tokens do not depend on them."""

_TEXT = "this server has no tokenizer: send `input_ids`"
_MEDIA = "only images are supported, as `image_data`"
_DISAGGREGATED = "prefill and decoding are not split"
_EXTRA_OUTPUT = "answers hold only ids, logprobs and versions of the sampled tokens"

GENERATE_REFUSED: dict[str, str] = {
    "text": "this server takes token ids and has no tokenizer: text that is encoded again is not the text that was "
    "sampled. Send `input_ids`",
    "input_embeds": "prompts are token ids",
    "positional_embed_overrides": "prompts are token ids",
    "video_data": _MEDIA,
    "audio_data": _MEDIA,
    "video_config": _MEDIA,
    "use_audio_in_video": _MEDIA,
    "max_dynamic_patch": "the model's own image processor decides",
    "min_dynamic_patch": "the model's own image processor decides",
    "logprob_start_len": _EXTRA_OUTPUT,
    "top_logprobs_num": _EXTRA_OUTPUT,
    "token_ids_logprob": _EXTRA_OUTPUT,
    "return_sampling_mask": _EXTRA_OUTPUT,
    "sampling_logprobs_mode": _EXTRA_OUTPUT,
    "return_flat_raw_top_logprobs": _EXTRA_OUTPUT,
    "return_flat_raw_output_top_logprobs": _EXTRA_OUTPUT,
    "return_flat_raw_top_logprobs_b64": _EXTRA_OUTPUT,
    "return_hidden_states": _EXTRA_OUTPUT,
    "return_routed_experts": _EXTRA_OUTPUT,
    "routed_experts_start_len": _EXTRA_OUTPUT,
    "return_indexer_topk": _EXTRA_OUTPUT,
    "return_prompt_token_ids": _EXTRA_OUTPUT,
    "return_bytes": _EXTRA_OUTPUT,
    "return_entropy": _EXTRA_OUTPUT,
    "session_params": "send the whole prompt; its prefix is cached",
    "lora_path": "adapters are not served separately: publish merged weights",
    "lora_id": "adapters are not served separately: publish merged weights",
    "custom_logit_processor": "it is pickled code from the client",
    "watermark": "tokens would not be sampled from the policy",
    "require_reasoning": "grammars are not supported",
    "max_thinking_tokens": "use `max_new_tokens`",
    "background": "answers are not kept",
    "bootstrap_host": _DISAGGREGATED,
    "bootstrap_port": _DISAGGREGATED,
    "bootstrap_room": _DISAGGREGATED,
    "bootstrap_pair_key": _DISAGGREGATED,
    "decode_tp_size": _DISAGGREGATED,
    "need_wait_for_mm_inputs": _DISAGGREGATED,
    "num_items_assigned": _DISAGGREGATED,
    "encoder_urls": _DISAGGREGATED,
    "http_worker_ipc": "internal to SGLang",
}
"""Refused unless neutral (`_NEUTRAL`): the answer would silently lack something."""

_GRAMMAR = "tokens would not be sampled from the policy: check the answer in a reward or a tool"

SAMPLING_IGNORED: dict[str, str] = {
    "skip_special_tokens": "answers hold no text",
    "spaces_between_special_tokens": "answers hold no text",
    "no_stop_trim": "the stop token is always returned",
}

SAMPLING_REFUSED: dict[str, str] = {
    "stop": _TEXT + " and `stop_token_ids`",
    "stop_regex": _TEXT + " and `stop_token_ids`",
    "beam_width": "a beam search does not sample from the policy",
    "json_schema": _GRAMMAR,
    "regex": _GRAMMAR,
    "ebnf": _GRAMMAR,
    "structural_tag": _GRAMMAR,
    "custom_params": "they are for logit processors",
    "watermark": "tokens would not be sampled from the policy",
}

ADMIN_IGNORED: dict[str, str] = {
    "is_async": "an update is answered once it is served",
    "torch_empty_cache": "memory is reused",
    "recapture_cuda_graph": "engines do it when needed",
    "keep_pause": "a pause lasts until /continue_generation",
    "token_step": "the version's name tells it",
    "manifest": "the files tell it",
    "timeout_s": "a flush never waits",
    "abort_message": "it only feeds logs",
    "finished_reason": "internal to SGLang",
}

ADMIN_REFUSED: dict[str, str] = {
    "selector": "only `all` and `target`: there is no draft model",
    "pp_rank": "an engine is one stage: it is not split into a pipeline",
    "serialized_named_tensors": "pickled tensors are refused, because unpickling runs any code that the sender "
    "likes. Write them to `model.safetensors` in a folder in shared memory under a --weights-root and send `shm_path`",
}

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprob_start_len": (None, -1),  # 0: logprobs of the whole prompt
    "max_thinking_tokens": (None,),
    "beam_width": (None, 1),
    "selector": (None, "all", "target"),
}
"""Neutral values of refused fields; of the others: null, false, 0 and empty ones."""


def drop_without_effect(request: dict[str, Any], *, generate: bool) -> tuple[str, str] | None:
    """Remove ignored fields from a request, in place.

    Returns:
        The first refused field and the reason; None if no field is refused.
    """
    if not generate:
        return _drop(request, ADMIN_IGNORED, ADMIN_REFUSED, "")
    refused = _drop(request, GENERATE_IGNORED, GENERATE_REFUSED, "")
    sampling = request.get("sampling_params")
    if refused is None and isinstance(sampling, dict):
        refused = _drop(sampling, SAMPLING_IGNORED, SAMPLING_REFUSED, "sampling_params.")
    return refused


def _drop(
    fields: dict[str, Any], ignored: dict[str, str], refused: dict[str, str], prefix: str
) -> tuple[str, str] | None:
    for name in list(fields):
        value = fields[name]
        neutral = value in _NEUTRAL[name] if name in _NEUTRAL else not value
        if name in ignored or (neutral and name in refused):
            del fields[name]
        elif name in refused:
            return prefix + name, refused[name]
        elif value is None:
            del fields[name]  # for SGLang, null is the default everywhere
    return None
