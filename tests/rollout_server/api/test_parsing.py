"""Wrong requests cost no more than right ones; the answers of a batch share their prompt."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import orjson
import pytest
from pydantic import BaseModel, ValidationError

from agentloop.wire import GenerateRequest, MemoryRequest, UpdateWeightsFromDistributedRequest
from rollout_server.api.generate import LARGE_BODY_BYTES
from rollout_server.api.parsing import MAX_CONTAINERS, MAX_VALUES, parse, parse_generate
from rollout_server.errors import RequestError, TooLarge

MANY = 5000
LISTS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (GenerateRequest, {"input_ids": ["a"] * MANY}),
    (GenerateRequest, {"input_ids": [1], "image_data": [1] * MANY}),
    (GenerateRequest, {"input_ids": [1], "sampling_params": {"stop_token_ids": ["a"] * MANY}}),
    (MemoryRequest, {"tags": ["a"] * MANY}),
    (UpdateWeightsFromDistributedRequest, {"names": [1] * MANY, "dtypes": [1] * MANY, "shapes": [1] * MANY}),
    (UpdateWeightsFromDistributedRequest, {"names": ["a"], "dtypes": ["a"], "shapes": [["a"] * MANY]}),
]


@pytest.mark.parametrize(("model", "request_"), LISTS)
def test_of_a_list_only_the_first_wrong_entry_is_reported(model: type[BaseModel], request_: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(orjson.dumps(request_), strict=True)
    assert caught.value.error_count() <= 3
    with pytest.raises(RequestError, match=r"\.0"):
        parse(model, orjson.dumps(request_))


def test_keys_that_are_there_many_times_are_one() -> None:
    with pytest.raises(RequestError, match="unknown field 'k'"):
        parse_generate(b'{"input_ids":[1],' + b",".join([b'"k":1'] * MANY) + b"}")


def test_a_large_right_request_is_read() -> None:
    bias = {str(i): 0.5 for i in range(MANY)}
    request = parse_generate(orjson.dumps({"input_ids": [1], "sampling_params": {"logit_bias": bias}}))
    assert isinstance(request, GenerateRequest)
    assert request.sampling_params.logit_bias == {i: 0.5 for i in range(MANY)}


def test_the_answers_of_a_batch_share_what_is_large() -> None:
    sampling = {"n": 3, "sampling_seed": 2**63 - 1, "logit_bias": {"4": 1.0}, "stop_token_ids": [5]}
    requests = parse_generate(orjson.dumps({"input_ids": [[1, 2], [3]], "rid": "a", "sampling_params": sampling}))
    assert isinstance(requests, list)
    assert [one.rid for one in requests] == [f"a_{i}" for i in range(6)]
    assert [one.sampling_params.sampling_seed for one in requests] == [2**63 - 1, 0, 1] * 2
    assert len({id(one.input_ids) for one in requests}) == 2
    assert len({id(one.sampling_params.logit_bias) for one in requests}) == 1
    assert len({id(one.sampling_params.stop_token_ids) for one in requests}) == 1
    assert requests[0].sampling_params.logit_bias == {4: 1.0}


MANY_VALUES = [
    b'{"input_ids": [' + b"1," * MAX_VALUES + b"1]}",
    b'{"input_ids": [[' + b"1," * (MAX_VALUES // 2) + b"1],[" + b"1," * (MAX_VALUES // 2) + b"1]]}",
    b'{"x": [' + b"[]," * MAX_CONTAINERS + b"[]]}",
    b'{"input_ids": [' + b"{}," * MAX_CONTAINERS + b"{}]}",
    b"[" * 10**6,
]


@pytest.mark.parametrize("body", MANY_VALUES, ids=range(len(MANY_VALUES)))
def test_more_values_than_any_request_needs_are_refused_unread(body: bytes) -> None:
    for read in (parse_generate, lambda body: parse(MemoryRequest, body)):
        with pytest.raises(TooLarge, match=r"of at most .*: send several requests"):
            read(body)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (["a" * 1000] * 5, "at most 4096 images together, not 20480"),
        ("a" * 2**17, "at most 268435456 characters together, not 536870912"),
        ([["a" * 2**17]], "characters"),
    ],
)
def test_images_count_once_for_each_answer(images: Any, says: str) -> None:
    def request(n: int) -> bytes:
        return orjson.dumps({"input_ids": [1], "image_data": images, "sampling_params": {"n": n}})

    with pytest.raises(RequestError, match=says) as caught:
        parse_generate(request(4096))
    assert caught.value.field == "image_data"
    answers = parse_generate(request(64))
    assert isinstance(answers, list)
    assert answers[0].image_data is answers[63].image_data


async def test_a_large_body_is_read_in_a_thread(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def noted(body: bytes) -> Any:
        threads.append(threading.current_thread())
        return parse_generate(body)

    monkeypatch.setattr("rollout_server.api.generate.parse_generate", noted)
    for size in (10, LARGE_BODY_BYTES):
        image = orjson.dumps({"input_ids": [1], "image_data": "a" * size})
        answer = await client.post("/generate", content=image)
        assert answer.json()["error"]["field"] == "image_data"  # the model takes none
    assert [thread is threading.main_thread() for thread in threads] == [True, False]
