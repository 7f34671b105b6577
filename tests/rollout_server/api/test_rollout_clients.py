"""Requests of the rollout clients of slime, verl, AReaL and Miles, as their sources send them to SGLang.

Read from slime 624b824, verl 1dda039, AReaL 4aef98d (May to August 2026) and Miles 31f1ca9. What is refused is in the
table of docs/rollout_server.md, section "Clients of SGLang".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from agentloop.wire import (
    InitWeightsUpdateGroupRequest,
    UpdateWeightsFromDistributedRequest,
)
from rollout_server.api.parsing import parse
from tests.rollout_server.support import random_ids

IDS = random_ids(12, seed=3)
SLIME_SAMPLING = {
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 6, "stop": None, "stop_token_ids": None,
    "skip_special_tokens": True, "no_stop_trim": True, "spaces_between_special_tokens": False, "sampling_seed": 42,
}  # fmt: skip
AREAL_SAMPLING = {
    "top_p": 1.0, "top_k": 100_000_000, "max_new_tokens": 6, "temperature": 1.0, "stop_token_ids": [5, 6],
    "ignore_eos": False, "skip_special_tokens": True, "frequency_penalty": 0.0,
}  # fmt: skip
VERL_SAMPLING = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": 6}
MILES_SCORING = {
    "input_ids": [IDS, IDS], "return_logprob": True, "logprob_start_len": 4,
    "sampling_params": {**VERL_SAMPLING, "max_new_tokens": 0, "temperature": 0, "skip_special_tokens": False},
}  # fmt: skip

WORKS: list[tuple[str, str, str, Any]] = [
    ("slime", "POST", "/generate", {"input_ids": IDS, "sampling_params": SLIME_SAMPLING, "return_logprob": True}),
    ("slime", "GET", "/health_generate", None),
    ("slime", "GET", "/flush_cache", None),
    ("slime", "GET", "/get_weight_version", None),
    ("slime", "POST", "/pause_generation", {}),
    ("slime", "POST", "/continue_generation", {}),
    ("slime", "POST", "/abort_request", {"abort_all": True}),
    ("slime", "GET", "/v1/loads?include=core", None),
    ("slime", "POST", "/update_weights_from_disk", {"model_path": "WEIGHTS", "weight_version": "3"}),
    ("slime", "POST", "/update_weights_from_disk", {"model_path": "WEIGHTS", "load_format": "auto"}),
    ("verl", "POST", "/generate", {"input_ids": IDS, "sampling_params": VERL_SAMPLING, "return_logprob": False}),
    ("verl", "POST", "/generate", {"rid": "r", "input_ids": IDS, "sampling_params": VERL_SAMPLING,
                                   "return_logprob": True, "image_data": None}),
    ("verl", "GET", "/health_generate", None),
    ("verl", "GET", "/flush_cache", None),
    ("verl", "POST", "/abort_request", {"rid": "", "abort_all": True}),
    ("AReaL", "POST", "/generate", {"input_ids": IDS, "image_data": None, "sampling_params": AREAL_SAMPLING,
                                    "return_logprob": True, "stream": False}),
    ("AReaL", "GET", "/health", {}),
    ("AReaL", "POST", "/pause_generation", {}),
    ("AReaL", "POST", "/continue_generation", {}),
    ("AReaL", "POST", "/update_weights_from_disk", {"model_path": "WEIGHTS", "abort_all_requests": True}),
    ("Miles", "POST", "/generate", {"input_ids": IDS, "sampling_params": SLIME_SAMPLING, "return_logprob": True,
                                    "return_routed_experts": False, "return_indexer_topk": False}),
    ("Miles", "GET", "/model_info", None),
    ("Miles", "GET", "/server_info", None),
    ("Miles", "POST", "/pause_generation", {"mode": "retract"}),
    ("Miles", "POST", "/begin_weight_update", {"selector": "all"}),
    ("Miles", "POST", "/end_weight_update", {}),
    ("Miles", "POST", "/update_weight_version", {"new_version": "4", "abort_all_requests": False}),
    ("Miles", "POST", "/update_weights_from_disk", {"model_path": "WEIGHTS", "weight_version": "5"}),
    ("Miles", "POST", "/continue_generation", {}),
]  # fmt: skip

REFUSED: list[tuple[str, str, Any, int, str | None]] = [
    ("slime", "/generate", {"text": "a", "sampling_params": SLIME_SAMPLING, "return_logprob": True}, 400, "text"),
    ("slime", "/generate", {"input_ids": IDS, "return_routed_experts": True}, 400, "return_routed_experts"),
    ("slime", "/generate", {"input_ids": IDS, "sampling_params": {**SLIME_SAMPLING, "stop": ["a"]}}, 400,
     "sampling_params.stop"),
    ("slime", "/generate", {"input_ids": IDS, "sampling_params": {"custom_params": {"return_top_p_token_ids": True}}},
     400, "sampling_params.custom_params"),
    ("slime", "/update_weights_from_tensor", {"serialized_named_tensors": ["gASV"], "load_format": None,
                                              "flush_cache": False, "weight_version": "3"}, 400,
     "serialized_named_tensors"),
    ("slime", "/release_memory_occupation", {}, 409, None),
    ("slime", "/weights_checker", {"action": "checksum"}, 404, None),
    ("slime", "/post_process_weights", {"restore_weights_before_load": False}, 404, None),
    ("slime", "/pull_weights", {"target_version": 3}, 404, None),
    ("verl", "/generate", {"input_ids": IDS, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 5},
     400, "logprob_start_len"),
    ("verl", "/resume_memory_occupation", {"tags": ["kv_cache"]}, 409, None),
    ("verl", "/update_weights_from_tensor", {"serialized_named_tensors": [], "load_format": None,
                                             "flush_cache": False}, 400, "shm_path"),
    ("AReaL", "/generate", {"input_ids": IDS, "lora_path": "lora-v3"}, 400, "lora_path"),
    ("AReaL", "/load_lora_adapter", {"lora_name": "lora-v3", "lora_path": "a"}, 404, None),
    ("AReaL", "/update_weights_from_distributed", {"names": ["a"], "dtypes": ["bfloat16"], "shapes": [[2, 3]],
                                                   "group_name": "g", "abort_all_requests": True}, 409, "group_name"),
    ("Miles", "/generate", MILES_SCORING, 400, "logprob_start_len"),
    ("Miles", "/begin_weight_update", {"selector": "draft"}, 400, "selector"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "sent"), [row[1:] for row in WORKS], ids=[f"{i}-{w[0]}-{w[2]}" for i, w in enumerate(WORKS)]
)
async def test_a_request_of_a_known_client_is_served(
    client: httpx.AsyncClient, other_weights: Path, method: str, path: str, sent: Any
) -> None:
    if isinstance(sent, dict) and "model_path" in sent:
        sent = {**sent, "model_path": str(other_weights)}
    answer = await client.request(method, path, json=sent)
    assert answer.status_code == 200, answer.text
    if path == "/generate":
        meta, ids = answer.json()["meta_info"], answer.json()["output_ids"]
        assert meta["finish_reason"]["type"] in ("stop", "length") and meta["completion_tokens"] == len(ids)
        if sent["return_logprob"]:
            assert [item[1] for item in meta["output_token_logprobs"]] == ids
    elif method == "POST":
        assert answer.json()["success"] is True


@pytest.mark.parametrize(
    ("path", "sent", "status", "field"),
    [row[1:] for row in REFUSED],
    ids=[f"{i}-{w[0]}" for i, w in enumerate(REFUSED)],
)
async def test_what_cannot_work_is_refused_with_its_reason(
    client: httpx.AsyncClient, path: str, sent: Any, status: int, field: str | None
) -> None:
    answer = await client.post(path, json=sent)
    error = answer.json()
    assert (answer.status_code, error["error"]["field"], error["success"]) == (status, field, False)
    assert error["message"]


def test_the_groups_of_every_client_are_read() -> None:
    slime = {"master_address": "10.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 3,
             "group_name": "slime-pp_0", "backend": "nccl"}  # fmt: skip
    areal = {**slime, "master_port": "29500", "group_name": "update_weight_group"}
    for sent in (slime, areal):
        request = parse(InitWeightsUpdateGroupRequest, httpx.Request("POST", "http://a", json=sent).content)
        assert request.master_port == 29500
    miles = {"names": ["a"], "dtypes": ["bfloat16"], "shapes": [[2, 3]], "group_name": "g", "flush_cache": False,
             "selector": "all", "weight_version": "3"}  # fmt: skip
    body = httpx.Request("POST", "http://a", json=miles).content
    assert parse(UpdateWeightsFromDistributedRequest, body).weight_version == "3"


async def test_the_routing_key_of_sglangs_router_names_the_session(client: httpx.AsyncClient) -> None:
    sent = {"input_ids": IDS, "sampling_params": SLIME_SAMPLING, "return_logprob": True}
    answer = await client.post("/generate", json=sent, headers={"X-SMG-Routing-Key": "sample-7"})
    assert answer.status_code == 200
    refused = await client.post("/generate", json=sent, headers={"X-SMG-Routing-Key": "k" * 300})
    assert refused.status_code == 400
