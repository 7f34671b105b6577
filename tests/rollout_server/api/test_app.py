"""The HTTP surface: what is answered to good and to bad requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from agentloop.config.server import ServerSettings
from agentloop.wire import GenerateResponse, ServerInfo
from rollout_server.api.app import ADMIN_PATHS, build_app
from rollout_server.engines.torch_engine.engine import TorchEngine
from rollout_server.replica.local import LocalReplica
from rollout_server.router.router import Router
from tests.rollout_server.support import CONTEXT, TOLERANCE, VOCAB, Reference, random_ids


def body(ids: Any = (9, 10, 11), **changes: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": 6, "ignore_eos": True, **changes.pop("sampling", {})}
    return {"input_ids": list(ids), "sampling_params": sampling, **changes}


async def test_generate_answers_ids_logprobs_and_spans(client: httpx.AsyncClient, model_dir: Path) -> None:
    prompt = random_ids(25, seed=1)
    answer = await client.post("/generate", json=body(prompt, rid="mine", sampling={"sampling_seed": 4}))
    assert answer.status_code == 200
    parsed = GenerateResponse.model_validate(answer.json())
    meta = parsed.meta_info
    assert (meta.id, meta.prompt_tokens, meta.completion_tokens, meta.weight_version) == ("mine", 25, 6, "0")
    assert (meta.finish_reason.type, meta.finish_reason.length) == ("length", 6)
    assert meta.weight_versions is not None
    assert [span.model_dump() for span in meta.weight_versions] == [{"version": "0", "start": 0, "end": 6}]
    assert meta.output_token_logprobs is not None
    assert [token for _, token, _ in meta.output_token_logprobs] == parsed.output_ids
    expected = Reference(model_dir).logprobs(prompt + parsed.output_ids, 25, 1.0)
    got = [logprob for logprob, _, _ in meta.output_token_logprobs]
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < TOLERANCE
    again = await client.post("/generate", json=body(prompt, return_logprob=False, sampling={"sampling_seed": 4}))
    assert again.json()["output_ids"] == parsed.output_ids
    assert "output_token_logprobs" not in again.json()["meta_info"]


BAD = [
    ({"text": "hi", **body()}, "text", "no tokenizer"),
    (body(ids=[]), "input_ids", "at least 1"),
    (body(ids=[1, VOCAB]), "input_ids.1", "outside the vocabulary"),
    (body(ids=[-1]), "input_ids.0", "outside the vocabulary"),
    (body(ids=[1.5]), "input_ids.0", "integer"),
    (body(ids=["1"]), "input_ids.0", "integer"),
    (body(ids=[True]), "input_ids.0", "integer"),
    (body(ids=[2**70]), "input_ids.0", ""),
    (body(ids=[9] * CONTEXT), "input_ids", "context"),
    (body(sampling={"max_new_tokens": CONTEXT}), "sampling_params.max_new_tokens", "context"),
    (body(sampling={"max_new_tokens": -1}), "sampling_params.max_new_tokens", "greater"),
    (body(sampling={"n": 0}), "sampling_params.n", "at least 1"),
    (body(sampling={"n": "2"}), "sampling_params.n", "whole number"),
    (body(sampling={"n": 10**9}), "input_ids", "at most 4096 answers"),
    (body(ids=[[1], [VOCAB]]), "input_ids.0", "answer 1 of the batch"),
    (body(ids=[[1], 2]), "input_ids", "list"),
    ({**body(ids=[[1], [2]]), "sampling_params": [{}]}, "sampling_params", "1 entries for 2 prompts"),
    ({**body(ids=[[1], [2]]), "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params.n", "the same"),
    (body(ids=[[1], [2]], rid=["a", "a"]), "rid", "twice"),
    (body(ids=[[1], [2]], rid=["a"]), "rid", "list of 2"),
    (body(sampling={"temperature": -0.1}), "sampling_params.temperature", "greater"),
    (body(sampling={"top_p": 0.0}), "sampling_params.top_p", "greater"),
    (body(sampling={"top_k": 1.5}), "sampling_params.top_k", "integer"),
    (body(sampling={"temprature": 1.0}), "sampling_params.temprature", "'temperature'"),
    (body(retrun_logprob=True), "retrun_logprob", "'return_logprob'"),
    (body(stream=1), "stream", "boolean"),
    (body(image_data=["aGk="]), "image_data", "images"),
    (body(ids=[9] * 9000, sampling={"n": 4096}), "input_ids", "send several requests"),
    (body(sampling={"n": 4096, "max_new_tokens": CONTEXT}), "sampling_params.max_new_tokens", "answer 0"),
    (body(ids=[[1], [1, "a"]], sampling={"n": 2}), "input_ids.1", "answer 2 of the batch"),
    (body(sampling={"n": 2, "stop_token_ids": [VOCAB]}), "sampling_params.stop_token_ids.0", "answer 0"),
    (body(**{"k" * 10**6: 1}), "k" * 100 + "...", "unknown field"),
    (body(sampling={"k" * 10**6: 1}), "sampling_params." + "k" * 100 + "...", "unknown field"),
    (body(**{f"k{i}": 1 for i in range(2000)}), "body", "2002 keys"),
    (body(sampling={f"k{i}": 1 for i in range(2000)}), "sampling_params", "2002 keys"),
    (body(sampling={"logit_bias": {f"k{i}": 1 for i in range(2000)}}), "sampling_params.logit_bias", "'k0'"),
    (body(sampling={"logit_bias": {i: "a" for i in range(2000)}}), "sampling_params.logit_bias.0", "-100 to 100"),
    ({"sampling_params": {}}, "input_ids", "required"),
    ([], None, ""),
]


@pytest.mark.parametrize(
    ("sent", "field", "says"), BAD, ids=[f"{i}-{(field or '')[:40]}" for i, (_, field, _) in enumerate(BAD)]
)
async def test_a_bad_request_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, sent: Any, field: str | None, says: str
) -> None:
    answer = await client.post("/generate", json=sent)
    error = answer.json()["error"]
    assert (answer.status_code, error["field"], error["type"]) == (400, field, "invalid_request")
    assert says in error["message"] and len(error["message"]) < 1000


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b'{"input_ids": [1], "sampling_params": {"max_new_tokens": 1, "temperature": NaN}}',
    ],
)
async def test_what_is_no_request_is_a_400(client: httpx.AsyncClient, raw: bytes) -> None:
    answer = await client.post("/generate", content=raw)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request"


async def test_a_body_beyond_the_limit_is_refused_unread(client: httpx.AsyncClient) -> None:
    for path in ("/generate", "/pause_generation"):
        answer = await client.post(path, content=b"{}", headers={"content-length": str(2**40)})
        assert answer.status_code == 413


async def test_other_answers_are_json_errors_too(client: httpx.AsyncClient) -> None:
    assert (await client.get("/nothing")).json()["error"]["type"] == "not_found"
    assert (await client.get("/generate")).status_code == 405


async def test_weights_are_loaded_from_the_roots_only(
    client: httpx.AsyncClient, model_dir: Path, other_weights: Path, tmp_path: Path
) -> None:
    link = other_weights / "link"
    if not link.exists():
        link.symlink_to(model_dir)

    async def update(path: Path, **more: Any) -> httpx.Response:
        request = {"model_path": str(path), "weight_version": "1", **more}
        return await client.post("/update_weights_from_disk", json=request)

    for forbidden in (model_dir, tmp_path, other_weights / ".." / model_dir.name, link):
        assert (await update(forbidden)).status_code == 403
    assert (await update(other_weights / "missing")).status_code == 400
    assert (await update(other_weights, load_format="pt")).json()["error"]["field"] == "load_format"
    assert (await client.get("/server_info")).json()["weight_version"] == "0"
    served = (await update(other_weights)).json()
    assert (served["success"], served["weight_version"]) == (True, "1")
    assert served["checksum"] == (await client.get("/server_info")).json()["checksum"]
    answer = await client.post("/generate", json=body())
    assert answer.json()["meta_info"]["weight_versions"] == [{"version": "1", "start": 0, "end": 6}]


async def test_a_file_that_links_out_of_the_roots_is_not_read(
    client: httpx.AsyncClient, model_dir: Path, other_weights: Path
) -> None:
    folder = other_weights / "linked"
    folder.mkdir(exist_ok=True)
    inside, outside = folder / "model.safetensors", model_dir / "model.safetensors"
    for target, status in ((outside, 403), (other_weights / "model.safetensors", 200)):
        inside.unlink(missing_ok=True)
        inside.symlink_to(target)
        answer = await client.post("/update_weights_from_disk", json={"model_path": str(folder), "weight_version": "1"})
        assert answer.status_code == status, answer.text
        if status == 403:
            assert "linked/model.safetensors links to a file outside" in answer.json()["error"]["message"]
    inside.unlink()


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "\x00", "a\u2028b", "a" * 300, "\u202eb"])
async def test_names_that_would_break_a_log_are_refused(
    client: httpx.AsyncClient, other_weights: Path, name: str
) -> None:
    for path, sent, field in (
        ("/generate", body(rid=name), "rid"),
        ("/generate", body(session_id=name), "session_id"),
        ("/abort_request", {"rid": name}, "rid"),
        (
            "/update_weights_from_disk",
            {"model_path": str(other_weights), "weight_version": name},
            "weight_version",
        ),
        ("/destroy_weights_update_group", {"group_name": name}, "group_name"),
    ):
        answer = await client.post(path, json=sent)
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)
    answer = await client.post("/generate", json=body(), headers={"X-Session-Id": "a" * 300})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "X-Session-Id")


async def test_a_folder_that_does_not_hold_the_weights_is_a_400(client: httpx.AsyncClient, other_weights: Path) -> None:
    empty = other_weights / "empty"
    empty.mkdir(exist_ok=True)
    answer = await client.post("/update_weights_from_disk", json={"model_path": str(empty), "weight_version": "1"})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "model_path")


async def test_a_paused_server_answers_after_it_goes_on(client: httpx.AsyncClient) -> None:
    assert (await client.post("/pause_generation", json={"mode": "in_place"})).json()["success"]
    call = asyncio.create_task(client.post("/generate", json=body()))
    await asyncio.sleep(0.1)
    assert not call.done()
    assert (await client.get("/server_info")).json()["states"][0]["paused"]
    assert (await client.post("/continue_generation")).json()["success"]
    assert (await call).status_code == 200
    assert (await client.post("/pause_generation", json={"mode": "nap"})).status_code == 400


async def test_abort_by_id_and_flush(client: httpx.AsyncClient) -> None:
    assert (await client.post("/abort_request", json={})).json()["error"]["field"] == "rid"
    await client.post("/pause_generation", json={"mode": "retract"})
    call = asyncio.create_task(client.post("/generate", json=body(rid="mine")))
    await asyncio.sleep(0.1)
    assert (await client.post("/abort_request", json={"rid": "mine"})).json()["message"] == "1 aborted"
    finish = (await call).json()["meta_info"]["finish_reason"]
    assert finish == {"type": "abort", "message": "aborted on request"}
    assert (await client.post("/flush_cache")).json()["success"]
    await client.post("/continue_generation", json={})


async def test_what_it_says_of_itself(client: httpx.AsyncClient) -> None:
    await client.post("/generate", json=body())
    await client.post("/generate", json={})
    info = ServerInfo.model_validate((await client.get("/server_info")).json())
    assert (info.engine, info.context_length, info.vocab_size, info.replicas) == ("torch", CONTEXT, VOCAB, 1)
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/health_generate")).status_code == 200
    metrics = (await client.get("/metrics")).text
    assert 'rollout_requests_total{status="200"} 1.0' in metrics
    assert 'rollout_requests_total{status="400"} 1.0' in metrics
    assert 'rollout_sampled_tokens_total{replica="local"} 7.0' in metrics
    assert 'rollout_replica{replica="local",state="serving",version="0"} 1.0' in metrics
    schema = (await client.get("/openapi.json")).json()
    assert {"/generate", "/update_weights_from_disk", "/health", *ADMIN_PATHS} <= set(schema["paths"])


async def test_the_token_is_required_everywhere_but_at_health(
    engine_factory: Callable[..., TorchEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_TOKEN", "secret")
    app = build_app(Router([LocalReplica(engine_factory())]), settings=ServerSettings(model="", token_env="A_TOKEN"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        assert (await http.get("/health")).status_code == 200
        for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
            answer = await http.post("/generate", json=body(), headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "unauthorized")
            assert (await http.get("/metrics", headers=headers)).status_code == 401
        answer = await http.post("/generate", json=body(), headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200


async def test_an_engine_in_the_servers_own_process_is_not_scaled(client: httpx.AsyncClient) -> None:
    answer = await client.post("/scale_replicas", json={"replicas": 2})
    assert answer.status_code == 409 and "start it with 2 replicas or more" in answer.json()["error"]["message"]
    assert (await client.post("/scale_replicas", json={"replicas": 0})).status_code == 400


async def test_a_batch_is_answered_in_sglangs_order(client: httpx.AsyncClient, model_dir: Path) -> None:
    prompts = [[9, 10], [20, 21, 22], [30]]
    reference = Reference(model_dir)
    sent = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 4, "temperature": 0, "n": 2}, "rid": "b"}
    answers = (await client.post("/generate", json=sent)).json()
    assert [a["meta_info"]["id"] for a in answers] == [f"b_{i}" for i in range(6)]
    for i, answer in enumerate(answers):
        assert answer["output_ids"] == reference.greedy(prompts[i // 2], 4)[: len(answer["output_ids"])]
        assert answer["meta_info"]["prompt_tokens"] == len(prompts[i // 2])

    # One value for all, or one for each prompt.
    each = [{"max_new_tokens": n, "ignore_eos": True} for n in (1, 2, 3)]
    sent = {
        "input_ids": prompts,
        "sampling_params": each,
        "return_logprob": [True, False, True],
        "rid": ["x", "y", "z"],
    }
    answers = (await client.post("/generate", json=sent)).json()
    assert [(a["meta_info"]["id"], len(a["output_ids"])) for a in answers] == [("x", 1), ("y", 2), ("z", 3)]
    assert ["output_token_logprobs" in a["meta_info"] for a in answers] == [True, False, True]
    assert isinstance((await client.post("/generate", json=body(ids=[[9]]))).json(), list)


async def test_samples_of_one_seeded_prompt_differ(client: httpx.AsyncClient) -> None:
    sampling = {"n": 3, "sampling_seed": 5, "max_new_tokens": 8}
    answers = [(await client.post("/generate", json=body(sampling=sampling))).json() for _ in range(2)]
    ids = [[one["output_ids"] for one in answer] for answer in answers]
    assert ids[0] == ids[1] and len({tuple(one) for one in ids[0]}) == 3
    alone = await client.post("/generate", json=body(sampling={**sampling, "n": 1}))
    assert alone.json()["output_ids"] == ids[0][0]


async def test_the_events_of_a_batch_name_their_answer(client: httpx.AsyncClient) -> None:
    sent = body(ids=[[9, 10], [11]], stream=True, sampling={"temperature": 0})
    whole = [one["output_ids"] for one in (await client.post("/generate", json={**sent, "stream": False})).json()]
    events = [line.removeprefix("data: ") for line in (await client.post("/generate", json=sent)).text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""] and events.count("[DONE]") == 1
    last = {event["index"]: event for event in map(orjson.loads, events[:-2])}
    assert [last[i]["output_ids"] for i in (0, 1)] == whole
    assert all(event["meta_info"]["finish_reason"] for event in last.values())


async def test_sampling_parameters_are_optional_and_none_may_be_sampled(client: httpx.AsyncClient) -> None:
    for sent in ({"input_ids": [9]}, {"input_ids": [9], "sampling_params": None}):
        assert (await client.post("/generate", json=sent)).status_code == 200
    answer = (await client.put("/generate", json=body(sampling={"max_new_tokens": 0}))).json()
    assert answer["output_ids"] == [] and answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert answer["meta_info"]["output_token_logprobs"] == []


async def test_new_tokens_are_clipped_to_the_context_on_demand(engine_factory: Callable[..., TorchEngine]) -> None:
    app = build_app(Router([LocalReplica(engine_factory())]), settings=ServerSettings(model="", clip_new_tokens=True))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        sampling = {"max_new_tokens": 10_000, "min_new_tokens": 100}
        answer = await http.post("/generate", json=body(random_ids(CONTEXT - 3, seed=1), sampling=sampling))
        assert len(answer.json()["output_ids"]) == 3
        assert (await http.post("/generate", json=body(random_ids(CONTEXT, seed=1)))).status_code == 400


async def test_errors_say_that_they_are_no_success(client: httpx.AsyncClient) -> None:
    for path in ("/generate", "/update_weights_from_disk", "/nothing"):
        answer = (await client.post(path, json={})).json()
        assert answer["success"] is False and answer["message"] == answer["error"]["message"]


async def test_the_version_can_be_renamed_and_an_update_without_a_name_keeps_it(
    client: httpx.AsyncClient, other_weights: Path
) -> None:
    async def version() -> Any:
        return (await client.get("/get_weight_version")).json()["weight_version"]

    await client.post("/pause_generation", json={"mode": "in_place"})
    call = asyncio.create_task(client.post("/generate", json=body()))
    await asyncio.sleep(0.05)
    renamed = await client.post("/update_weight_version", json={"new_version": "7", "abort_all_requests": False})
    assert renamed.json()["success"] and renamed.json()["new_version"] == "7" == await version()
    assert (await client.post("/update_weights_from_disk", json={"model_path": str(other_weights)})).json()["success"]
    await client.post("/continue_generation")
    assert (await call).json()["meta_info"]["weight_versions"] == [{"version": "7", "start": 0, "end": 6}]
    assert await version() == "7"
    info = (await client.get("/model_info")).json()
    assert (info["model_path"], info["weight_version"]) == (str(other_weights), "7")


async def test_a_pause_aborts_by_default_as_in_sglang(client: httpx.AsyncClient) -> None:
    await client.post("/pause_generation", json={"mode": "in_place"})
    call = asyncio.create_task(client.post("/generate", json=body()))
    await asyncio.sleep(0.05)
    loads = (await client.get("/v1/loads?include=core")).json()["loads"]
    assert [(load["num_total_reqs"], load["num_running_reqs"] + load["num_waiting_reqs"]) for load in loads] == [(1, 1)]
    await client.post("/pause_generation", json={})
    meta = (await call).json()["meta_info"]
    assert meta["finish_reason"]["type"] == "abort" and meta["output_token_logprobs"] == []
    assert (await client.get("/v1/loads")).json()["loads"][0]["num_total_reqs"] == 0
    await client.post("/continue_generation")


async def test_a_failed_engine_is_a_503_at_health(engine_factory: Callable[..., TorchEngine]) -> None:
    engine = engine_factory()
    app = build_app(Router([LocalReplica(engine)]), settings=ServerSettings(model=""))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        await engine.close()
        answer = await http.post("/generate", json=body())
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "engine_error")
        assert (await http.get("/health_generate")).status_code == 503
