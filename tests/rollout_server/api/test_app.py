"""The HTTP surface: what is answered to good and to bad requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
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
    (body(sampling={"max_new_tokens": 0}), "sampling_params.max_new_tokens", "greater"),
    (body(sampling={"temperature": -0.1}), "sampling_params.temperature", "greater"),
    (body(sampling={"top_p": 0.0}), "sampling_params.top_p", "greater"),
    (body(sampling={"top_k": 1.5}), "sampling_params.top_k", "integer"),
    (body(sampling={"temprature": 1.0}), "sampling_params.temprature", "'temperature'"),
    (body(retrun_logprob=True), "retrun_logprob", "'return_logprob'"),
    (body(stream=1), "stream", "boolean"),
    (body(image_data=["aGk="]), "image_data", "images"),
    ({"input_ids": [1]}, "sampling_params", "required"),
    ([], None, ""),
]


@pytest.mark.parametrize(("sent", "field", "says"), BAD, ids=[f"{i}-{field}" for i, (_, field, _) in enumerate(BAD)])
async def test_a_bad_request_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, sent: Any, field: str | None, says: str
) -> None:
    answer = await client.post("/generate", json=sent)
    error = answer.json()["error"]
    assert (answer.status_code, error["field"], error["type"]) == (400, field, "invalid_request")
    assert says in error["message"]


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
    await client.post("/pause_generation", json={})
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


async def test_a_failed_engine_is_a_503_at_health(engine_factory: Callable[..., TorchEngine]) -> None:
    engine = engine_factory()
    app = build_app(Router([LocalReplica(engine)]), settings=ServerSettings(model=""))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        await engine.close()
        answer = await http.post("/generate", json=body())
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "engine_error")
        assert (await http.get("/health_generate")).status_code == 503
