"""Fields of SGLang's requests that this server has no use for: which it takes without effect, and
which it refuses.

docs/rollout_server.md shows the same table; a test compares the two. Any other unknown field is a
400.
"""

from __future__ import annotations

from typing import Any

GENERATE_IGNORED: dict[str, str] = {
    "log_metrics": "all requests are counted",
    "no_logs": "requests are never logged",
    "return_text_in_logprobs": "there is no text",
    "priority": "requests are served in order",
    "routing_key": "X-Session-Id decides the replica",
    "routed_dp_rank": "X-Session-Id decides the replica",
    "data_parallel_rank": "X-Session-Id decides the replica",
    "disagg_prefill_dp_rank": "X-Session-Id decides the replica",
    "conversation_id": "a name",
    "custom_labels": "metrics have no labels of clients",
    "external_trace_header": "requests are not traced here",
    "received_time": "a fact for metrics",
    "extra_key": "prefixes are shared by all requests",
    "modalities": "follows from the data",
    "mm_hashes": "images are hashed here",
    "mm_content_hashes": "images are hashed here",
}
"""Taken without effect: the tokens of the answer are the same."""

_TEXT = "this server knows no tokenizer: send `input_ids`"
_MEDIA = "images are the only media, as `image_data`"
_DISAGGREGATED = "prefill and decoding are not split here"
_EXTRA_OUTPUT = "answers hold ids, logprobs and versions of the sampled tokens only"

GENERATE_REFUSED: dict[str, str] = {
    "text": "this server takes token ids and knows no tokenizer: text that is encoded again is not the text that was "
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
    "session_params": "send the whole prompt; its known prefix is cached",
    "lora_path": "adapters are not served apart: publish merged weights",
    "lora_id": "adapters are not served apart: publish merged weights",
    "custom_logit_processor": "it is pickled code of the client",
    "watermark": "tokens would not be the policy's",
    "require_reasoning": "nothing is masked for a grammar",
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
"""Refused unless null, false, 0 or empty: what the client asks for would silently be missing."""

_GRAMMAR = "tokens would not be the policy's: check the answer in a reward or a tool"

SAMPLING_IGNORED: dict[str, str] = {
    "skip_special_tokens": "there is no text",
    "spaces_between_special_tokens": "there is no text",
    "no_stop_trim": "the stop token is always returned",
}

SAMPLING_REFUSED: dict[str, str] = {
    "stop": _TEXT + " and `stop_token_ids`",
    "stop_regex": _TEXT + " and `stop_token_ids`",
    "n": "send the request n times: the prompt's cache is shared",
    "beam_width": "a beam search is no sample of the policy",
    "json_schema": _GRAMMAR,
    "regex": _GRAMMAR,
    "ebnf": _GRAMMAR,
    "structural_tag": _GRAMMAR,
    "custom_params": "they are for logit processors",
    "watermark": "tokens would not be the policy's",
}

ADMIN_IGNORED: dict[str, str] = {
    "is_async": "updates are answered when they are served",
    "torch_empty_cache": "memory is reused",
    "recapture_cuda_graph": "engines do it when they have to",
    "keep_pause": "a pause lasts until /continue_generation",
    "token_step": "the version's name says it",
    "manifest": "the files say it",
    "timeout_s": "a flush never waits",
    "abort_message": "a fact for logs",
    "finished_reason": "internal to SGLang",
}

ADMIN_REFUSED: dict[str, str] = {
    "serialized_named_tensors": "pickled tensors are not taken, because unpickling runs whatever code the sender "
    "likes. Write them to `model.safetensors` in a folder in shared memory under a --weights-root and send `shm_path`",
}

_NEUTRAL: dict[str, Any] = {"n": 1, "logprob_start_len": -1}
"""Values that ask for nothing, beside null, false, 0 and empty ones."""


def drop_without_effect(request: dict[str, Any], *, generate: bool) -> tuple[str, str] | None:
    """Take out of a request, in place, what has no effect here.

    Returns:
        The first refused field and the reason; None: nothing is refused.
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
        asks_nothing = not value or value == _NEUTRAL.get(name)
        if name in ignored or (asks_nothing and name in refused):
            del fields[name]
        elif name in refused:
            return prefix + name, refused[name]
        elif value is None:
            del fields[name]  # SGLang takes null for the default everywhere
    return None
