"""Every error of the server has an answer in one table, and crosses processes whole."""

from __future__ import annotations

import json
import pickle

import pytest

from agentloop.errors import AgentloopError
from rollout_server import errors
from rollout_server.errors import ServingError, answer_to

CASES: list[tuple[ServingError, int, str]] = [
    (errors.EngineError("broken"), 500, "engine_error"),
    (errors.ReplicaGone("gone"), 500, "engine_error"),
    (errors.NotServing("nothing"), 503, "engine_error"),
    (errors.Overloaded(7, retry_after_s=1.6), 503, "overloaded"),
    (errors.WeightsError("no tensors"), 400, "invalid_request"),
    (errors.RequestError("wrong", "input_ids"), 400, "invalid_request"),
    (errors.Unauthorized("no token", "Authorization"), 401, "unauthorized"),
    (errors.Forbidden("outside", "model_path"), 403, "forbidden"),
    (errors.Conflict("too few ranks", "world_size"), 409, "conflict"),
    (errors.UnknownImage("send it whole", "image_data"), 409, "unknown_image"),
    (errors.TooLarge("too large"), 413, "too_large"),
    (errors.UnsupportedMediaType("not JSON", "Content-Type"), 415, "invalid_request"),
    (errors.Refused(422, "not here", "rid"), 422, "invalid_request"),
]


@pytest.mark.parametrize(("error", "status", "kind"), CASES, ids=[type(error).__name__ for error, _, _ in CASES])
def test_every_error_has_its_status_and_type(error: ServingError, status: int, kind: str) -> None:
    answer = answer_to(error)
    assert answer.status == status
    message = str(error)
    assert json.loads(answer.body) == {
        "error": {"message": message, "field": error.field, "type": kind},
        "success": False,  # as SGLang's clients expect it
        "message": message,
    }
    assert isinstance(error, AgentloopError)
    again = pickle.loads(pickle.dumps(error))  # made here
    assert type(again) is type(error) and answer_to(again) == answer


def test_the_cases_are_the_whole_tree() -> None:
    def below(kind: type[ServingError]) -> set[type[ServingError]]:
        return set(kind.__subclasses__()).union(*(below(sub) for sub in kind.__subclasses__()))

    assert {type(error) for error, _, _ in CASES} == below(ServingError)


def test_only_a_full_queue_says_when_to_come_back() -> None:
    headers = {type(error): answer_to(error).headers for error, _, _ in CASES}
    assert headers.pop(errors.Overloaded) == {"retry-after": "2"}
    assert not any(headers.values())
