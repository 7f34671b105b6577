"""A client written from SGLang's documentation alone works against `agentloop serve`.

The client below knows SGLang's native API: its paths, fields, defaults and answers. It imports nothing of this
project. What differs on purpose is in docs/rollout_server.md, and tested at the end.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rollout_server.api import sglang_fields
from tests.rollout_server.server import Server
from tests.rollout_server.support import TOLERANCE, VOCAB, Reference


class SglangClient:
    """The native API over urllib."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})  # noqa: S310
        return self._open(request, timeout=60)

    def get(self, path: str) -> Any:
        with self._request(path) as answer:
            return json.loads(answer.read())

    def post(self, path: str, **body: Any) -> Any:
        with self._request(path, body) as answer:
            return json.loads(answer.read())

    def status(self, path: str) -> int:
        with self._request(path) as answer:
            return int(answer.status)

    def generate(self, input_ids: list[int], sampling_params: dict[str, Any], **more: Any) -> Any:
        return self.post("/generate", input_ids=input_ids, sampling_params=sampling_params, **more)

    def stream(self, input_ids: list[int], sampling_params: dict[str, Any]) -> Iterator[Any]:
        body = {"input_ids": input_ids, "sampling_params": sampling_params, "stream": True}
        with self._request("/generate", body) as answer:
            for line in answer:
                text = line.decode().strip()
                if text.startswith("data:"):
                    if text == "data: [DONE]":
                        return
                    yield json.loads(text[len("data:") :])


@pytest.fixture(scope="module")
def client(model_dir: Path, other_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangClient]:
    roots = ["--weights-root", str(other_weights), "--weights-root", str(model_dir)]
    options = ["--model", str(model_dir), "--replicas", "2", *roots]
    server = Server(tmp_path_factory.mktemp("serve"), *options, program=("agentloop.commands.main", "serve"))
    try:
        yield SglangClient(server.url)
        server.stop()
    finally:
        server.end()


def test_it_is_alive_and_says_what_it_serves(client: SglangClient, model_dir: Path) -> None:
    assert client.status("/health") == client.status("/health_generate") == 200
    for path in ("/model_info", "/get_model_info"):
        info = client.get(path)
        assert info["model_path"] == str(model_dir) and info["is_generation"] is True
    for path in ("/server_info", "/get_server_info"):
        assert client.get(path)["model_path"] == str(model_dir)


def test_a_generation_with_its_defaults(client: SglangClient) -> None:
    answer = client.generate([9, 10, 11], {})
    meta = answer["meta_info"]
    assert 1 <= len(answer["output_ids"]) <= 128
    assert meta["prompt_tokens"] == 3 and meta["completion_tokens"] == len(answer["output_ids"])
    assert meta["finish_reason"]["type"] in ("stop", "length") and isinstance(meta["id"], str)
    assert meta["cached_tokens"] >= 0


def test_everything_that_sampling_params_document_for_tokens(client: SglangClient, model_dir: Path) -> None:
    answer = client.generate(
        [9, 10, 11, 12],
        {
            "max_new_tokens": 12, "min_new_tokens": 3, "stop_token_ids": [5], "temperature": 0.8, "top_p": 0.9,
            "top_k": 50, "min_p": 0.01, "frequency_penalty": 0.1, "presence_penalty": 0.1, "repetition_penalty": 1.1,
            "n": 1, "ignore_eos": False, "skip_special_tokens": True, "spaces_between_special_tokens": True,
            "no_stop_trim": False, "stop": None, "regex": None, "json_schema": None, "ebnf": None,
            "logit_bias": {"8": -5},
            "sampling_seed": 3, "custom_params": None,
        },
        rid="mine", return_logprob=True, logprob_start_len=-1, top_logprobs_num=0, return_text_in_logprobs=False,
        lora_path=None, log_metrics=True, return_hidden_states=False, priority=None,
    )  # fmt: skip
    assert answer["meta_info"]["id"] == "mine"
    assert 3 <= len(answer["output_ids"]) <= 12
    assert [token for _, token, _ in answer["meta_info"]["output_token_logprobs"]] == answer["output_ids"]


def test_logprobs_are_triples_of_logprob_id_and_text(client: SglangClient, model_dir: Path) -> None:
    ids = [20, 21, 22]
    answer = client.generate(ids, {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}, return_logprob=True)
    expected = Reference(model_dir).logprobs(ids + answer["output_ids"], 3, 1.0)
    for (logprob, token, text), sampled, reference in zip(
        answer["meta_info"]["output_token_logprobs"], answer["output_ids"], expected, strict=True
    ):
        assert token == sampled and text is None and abs(logprob - reference) < TOLERANCE
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 8}


def test_a_stream_is_cumulative(client: SglangClient) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 9, "ignore_eos": True}
    whole = client.generate([30, 31], sampling)["output_ids"]
    pieces = [event["output_ids"] for event in client.stream([30, 31], sampling)]
    assert pieces[-1] == whole and len(pieces) > 1
    assert all(whole[: len(piece)] == piece for piece in pieces)


def test_weights_are_changed_while_generations_wait(client: SglangClient, model_dir: Path, other_weights: Path) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        client.post("/pause_generation", mode="retract")
        waiting = pool.submit(client.generate, [40, 41], sampling)
        time.sleep(0.2)
        assert not waiting.done()
        answer = client.post(
            "/update_weights_from_disk", model_path=str(other_weights), load_format="auto", abort_all_requests=False,
            weight_version="7", is_async=False, torch_empty_cache=False, keep_pause=False, flush_cache=True,
            token_step=0,
        )  # fmt: skip
        assert answer["success"] is True and isinstance(answer["message"], str)
        client.post("/continue_generation", torch_empty_cache=True)
        result = waiting.result()
    assert result["meta_info"]["weight_version"] == "7"
    assert client.get("/model_info")["weight_version"] == "7"
    assert result["output_ids"] == Reference(other_weights).greedy([40, 41], 6)
    assert client.post("/update_weights_from_disk", model_path=str(model_dir))["success"] is True
    assert client.generate([40, 41], sampling)["output_ids"] == Reference(model_dir).greedy([40, 41], 6)


def test_an_abort_ends_a_request(client: SglangClient) -> None:
    with ThreadPoolExecutor() as pool:
        client.post("/pause_generation", mode="in_place")
        running = pool.submit(client.generate, [1, 2], {"max_new_tokens": 400, "ignore_eos": True}, rid="long")
        time.sleep(0.2)
        client.post("/abort_request", rid="long", abort_all=False)
        client.post("/continue_generation")
        assert running.result()["meta_info"]["finish_reason"]["type"] == "abort"
    client.post("/abort_request", rid="", abort_all=True)
    client.post("/flush_cache")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"text": "The capital of France is", "sampling_params": {}}, "text"),
        ({"input_ids": [1], "sampling_params": {"stop": ["\n"]}}, "sampling_params.stop"),
        ({"input_ids": [1], "sampling_params": {"json_schema": "{}"}}, "sampling_params.json_schema"),
        ({"input_ids": [1], "sampling_params": {}, "top_logprobs_num": 3}, "top_logprobs_num"),
        ({"input_ids": [1], "sampling_params": {}, "lora_path": "x"}, "lora_path"),
        ({"input_ids": [VOCAB], "sampling_params": {}}, "input_ids.0"),
    ],
)
def test_what_is_not_served_is_said(client: SglangClient, body: dict[str, Any], field: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.post("/generate", **body)
    assert refused.value.code == 400
    assert json.loads(refused.value.read())["error"]["field"] == field


def test_the_documentation_lists_every_field_that_has_no_effect_or_is_refused() -> None:
    text = (Path(__file__).parents[3] / "docs/rollout_server.md").read_text(encoding="utf-8")
    without_effect, refused = text.split("Refused with a 400", 1)
    without_effect = without_effect[without_effect.index("Accepted without effect") :]
    for prefix, ignored, refusals in (
        ("", sglang_fields.GENERATE_IGNORED | sglang_fields.ADMIN_IGNORED, sglang_fields.GENERATE_REFUSED),
        ("sampling_params.", sglang_fields.SAMPLING_IGNORED, sglang_fields.SAMPLING_REFUSED),
        ("", {}, sglang_fields.ADMIN_REFUSED),
    ):
        for part, fields in ((without_effect, ignored), (refused, refusals)):
            for name, reason in fields.items():
                rows = [line for line in part.splitlines() if line.startswith("|") and f"`{prefix}{name}`" in line]
                row = "".join(rows[:1])
                assert reason in row, (name, reason)
