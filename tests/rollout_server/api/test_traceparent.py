"""`traceparent` (W3C Trace Context): passed on to a replica behind HTTP, and harmless everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from agentloop.client.client import GenerateClient
from agentloop.config.server import ServerSettings
from agentloop.trace import trace_headers
from agentloop.trace.spans import Recorder
from agentloop.wire import SamplingParams
from rollout_server.api.app import build_app
from rollout_server.engines.torch_engine.engine import TorchEngine
from rollout_server.replica.http import HttpReplica
from rollout_server.replica.local import LocalReplica
from rollout_server.router.router import Router
from tests.rollout_server.fakes import INFO
from tests.rollout_server.server import serving

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODY = {"input_ids": [9, 10, 11], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True, "sampling_seed": 1}}


async def test_it_reaches_the_replica_that_samples_and_changes_no_token(
    engine_factory: Callable[..., TorchEngine],
) -> None:
    inner = build_app(Router([LocalReplica(engine_factory())]), settings=ServerSettings(model=""))
    seen: list[str | None] = []

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/generate":
            seen.append(dict(scope["headers"]).get(b"traceparent", b"").decode() or None)
        await inner(scope, receive, send)

    async with serving(noting) as port:
        replica = HttpReplica("inner", f"http://127.0.0.1:{port}", INFO)
        outer = build_app(Router([replica]), settings=ServerSettings(model=""))
        transport = httpx.ASGITransport(outer)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            answers = [
                (await http.post("/generate", json=BODY, headers=headers)).json()["output_ids"]
                for headers in ({"traceparent": PARENT}, {}, {"traceparent": "not one"}, {"traceparent": PARENT + "x"})
            ]
            batch = {**BODY, "sampling_params": {**BODY["sampling_params"], "n": 2}}  # type: ignore[dict-item]
            assert (await http.post("/generate", json=batch, headers={"traceparent": PARENT})).status_code == 200
        assert seen == [PARENT, None, None, None, PARENT, PARENT]
        assert answers[0] == answers[1] == answers[2] == answers[3]

        # From an episode: the span that is open where the turn is asked for.
        recorder = Recorder()
        client = GenerateClient("http://127.0.0.1", context_headers=trace_headers, transport=transport)
        params = SamplingParams(max_new_tokens=4, ignore_eos=True, sampling_seed=1)
        with recorder, recorder.span("generate"):
            result = await client.generate([9, 10, 11], params, session_id="s", rid="r")
        assert result.token_ids == answers[0]
        assert seen[-1] == f"00-{recorder.trace_id}-{recorder.finish()[1].span_id}-01"
        await client.generate([9, 10, 11], params, session_id="s", rid="r2")
        assert seen[-1] is None
        await replica.close()


@pytest.mark.parametrize("value", ["", "x" * 5000, "00-" + "0" * 32])
async def test_a_value_that_is_none_is_ignored(client: httpx.AsyncClient, value: str) -> None:
    assert (await client.post("/generate", json=BODY, headers={"traceparent": value})).status_code == 200
