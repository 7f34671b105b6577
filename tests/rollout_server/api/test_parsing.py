"""Wrong requests cost no more than right ones; the answers of a batch share their prompt."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from pydantic import BaseModel, ValidationError

from agentloop.wire import GenerateRequest, MemoryRequest, UpdateWeightsFromDistributedRequest
from rollout_server.api.parsing import parse, parse_generate
from rollout_server.errors import RequestError

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
