"""Several generations in one request, as SGLang's clients send them: a list of prompts, and `n`.

In: the request's JSON. Out: the JSON of one request for each prompt, with the ids of its answers. A
field that is a list has one entry for each prompt. Answers have SGLang's order: all samples of the
first prompt, then those of the second; they share its list of ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from agentloop.wire import GenerateRequest
from rollout_server.errors import RequestError

MAX_BATCH = 4096
"""Most generations in one request: each takes memory before the queue's limit counts it."""

MAX_BATCH_TOKENS = 2**25
"""Most token ids over all answers of a request: of each the prompt, the stop tokens and the biased
tokens. Engines hold them for each answer."""

MAX_BATCH_IMAGES = 4096
MAX_BATCH_IMAGE_CHARACTERS = 2**28
"""Most images over all answers of a request, and their most characters: engines decode them for
each answer."""

_PER_PROMPT = (
    "return_logprob", "logprob_start_len", "top_logprobs_num", "return_hidden_states", "return_sampling_mask",
    "sampling_logprobs_mode", "extra_key", "cache_salt", "lora_path", "lora_id", "custom_logit_processor",
    "mm_hashes", "mm_content_hashes",
)  # fmt: skip
"""Fields with one value for all prompts, or a list with one for each."""


def is_batch(request: dict[str, Any]) -> bool:
    """Return whether a request asks for a list of answers: by several prompts, or by `n`."""
    ids, sampling = request.get("input_ids"), request.get("sampling_params")
    several = isinstance(ids, list) and bool(ids) and isinstance(ids[0], list)
    return several or isinstance(sampling, list) or (isinstance(sampling, dict) and _samples(sampling) > 1)


def expand(request: dict[str, Any]) -> list[tuple[dict[str, Any], list[str | None]]]:
    """Return one request for each prompt, and the ids of its answers. What all prompts share is one
    object.

    Raises:
        RequestError: a list does not have one entry for each prompt, or there are too many answers
            or tokens.
    """
    ids = request.get("input_ids")
    if not isinstance(ids, list) or not ids:
        raise RequestError("input_ids must be a list of token ids, or a list of such lists", "input_ids")
    prompts = ids if isinstance(ids[0], list) else [ids]
    count = len(prompts)
    samplings = _each(request, "sampling_params", count)
    samples = {_samples(sampling) for sampling in samplings if isinstance(sampling, dict)} or {1}
    if len(samples) > 1:
        raise RequestError("n must be the same for all prompts of a request", "sampling_params.n")
    each = samples.pop()
    if count * each > MAX_BATCH:
        raise RequestError(f"a request may have at most {MAX_BATCH} answers, not {count * each}", "input_ids")
    tokens = each * sum(map(_size, prompts, samplings))
    if tokens > MAX_BATCH_TOKENS:
        reason = f"all answers of a request may have at most {MAX_BATCH_TOKENS} token ids together, not {tokens}"
        raise RequestError(f"{reason}: send several requests", "input_ids")

    columns = {name: _each(request, name, count) for name in _PER_PROMPT if name in request}
    images = _images(request.get("image_data"), count)
    _check_images(images, each)
    rids = list(_rids(request.get("rid"), count, each))

    for sampling in samplings:
        if isinstance(sampling, dict):
            sampling.pop("n", None)
    requests = []
    for i, prompt in enumerate(prompts):
        one = {**request, "input_ids": prompt, "sampling_params": samplings[i], "image_data": images[i]}
        one.update({name: values[i] for name, values in columns.items()})
        requests.append((one, rids[i * each : (i + 1) * each]))
    return requests


def answers(prompt: GenerateRequest, rids: Sequence[str | None]) -> Iterator[GenerateRequest]:
    """Yield one request for each answer to a prompt, with its own id and its own seed: with the
    same seed, all would be equal."""
    sampling = prompt.sampling_params
    for number, rid in enumerate(rids):
        update: dict[str, Any] = {"rid": rid}
        if number and sampling.sampling_seed is not None:
            seed = (sampling.sampling_seed + number) % 2**63
            update["sampling_params"] = sampling.model_copy(update={"sampling_seed": seed})
        yield prompt.model_copy(update=update)


def _size(prompt: Any, sampling: Any) -> int:
    """Return how many token ids an answer holds before the first is sampled."""
    lists = [prompt]
    if isinstance(sampling, dict):
        lists += [sampling.get("stop_token_ids"), sampling.get("logit_bias")]
    return sum(len(ids) for ids in lists if isinstance(ids, list | dict))


def _samples(sampling: dict[str, Any]) -> int:
    """Return `n`, the number of answers to one prompt."""
    n = sampling.get("n")
    if n is None:
        return 1
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise RequestError("n must be a whole number of at least 1", "sampling_params.n")
    return n


def _each(request: dict[str, Any], name: str, count: int) -> list[Any]:
    """Return the value of a field for each prompt."""
    value = request.get(name)
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts", name)
    return value


def _images(value: Any, count: int) -> list[Any]:
    """Return the images of each prompt."""
    if value is None or value == []:
        return [None] * count
    if not isinstance(value, list):
        return [value] * count
    if count == 1 and not isinstance(value[0], list):
        return [value]  # all images of the only prompt
    if len(value) != count:
        raise RequestError(f"image_data has {len(value)} entries for {count} prompts", "image_data")
    return value


def _check_images(images: Sequence[Any], each: int) -> None:
    lists = [given if isinstance(given, list) else [given] for given in images if given is not None]
    number = each * sum(map(len, lists))
    if number > MAX_BATCH_IMAGES:
        reason = f"all answers of a request may have at most {MAX_BATCH_IMAGES} images together, not {number}"
        raise RequestError(f"{reason}: send several requests", "image_data")
    characters = each * sum(len(image) for given in lists for image in given if isinstance(image, str))
    if characters > MAX_BATCH_IMAGE_CHARACTERS:
        reason = f"the images of all answers of a request may have at most {MAX_BATCH_IMAGE_CHARACTERS} characters"
        raise RequestError(f"{reason} together, not {characters}: send several requests", "image_data")


def _rids(value: Any, count: int, each: int) -> Iterator[str | None]:
    """Return the id of each answer: one that is given for several of them gets their numbers."""
    if value is None:
        yield from [None] * (count * each)
    elif isinstance(value, str):
        for number in range(count * each):
            yield f"{value}_{number}" if count * each > 1 else value
    elif not isinstance(value, list) or len(value) != count or not all(isinstance(rid, str) for rid in value):
        raise RequestError(f"rid must be a text, or a list of {count} texts", "rid")
    elif len(set(value)) < count:
        raise RequestError("rid names the same id twice", "rid")
    else:
        for rid in value:
            yield from ([rid] if each == 1 else [f"{rid}_{number}" for number in range(each)])
