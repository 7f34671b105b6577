"""A bare SGLang as a replica: what is decided without one."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import orjson
import pytest

from agentloop.config.server import ServerSettings
from agentloop.wire import SamplingParams
from rollout_server.engines.base import EngineInfo, FolderWeights, Generation
from rollout_server.errors import RequestError, WeightsError
from rollout_server.placeholders import Placeholders
from rollout_server.replica.answer import Answer
from rollout_server.replica.sglang import SglangReplica
from rollout_server.replica.starting.sglang import sglang_command, sglang_environment


@pytest.mark.parametrize(("in_place", "count"), [(False, 0), (True, 1)])
def test_the_overlap_scheduler_is_off_where_in_place_updates_may_come(in_place: bool, count: int) -> None:
    settings = ServerSettings(model="m", engine="sglang", in_place_updates=in_place)
    assert sglang_command(settings, 0, 1).count("--disable-overlap-schedule") == count


async def test_an_in_place_update_is_refused_where_its_versions_would_be_wrong() -> None:
    replica = SglangReplica(
        "r", "http://127.0.0.1:9", EngineInfo("sglang", "m", 1000, 500), on_gpu=True, overlap=True, tensor_parallel=1
    )
    try:
        with pytest.raises(WeightsError, match="--in-place-updates"):
            await replica.update_weights(FolderWeights(Path("v1")), "1", "in_place")
    finally:
        await replica.close()


INFO = EngineInfo("sglang", "m", 1000, 500, images=True, placeholders=Placeholders(9, (9, 8)))
SEEN = Generation(
    "r", [1, 9, 9, 9, 2, 9, 3], SamplingParams(logit_bias={7: 1.0}), image_data=["file:///etc/hostname", "bbbb"]
)


def sglang(version: str = "0", info: EngineInfo = INFO, *, image_cache: bool = True) -> SglangReplica:
    options: dict[str, Any] = {"on_gpu": True, "overlap": True, "tensor_parallel": 1}
    return SglangReplica("r", "http://127.0.0.1:9", info, image_cache=image_cache, version=version, **options)


async def test_images_are_sent_in_sglangs_form() -> None:
    replica = sglang()
    request = replica._request(SEEN)
    assert request["input_ids"] == [1, 9, 2, 9, 3], "it expands one placeholder for each image"
    # Whatever a client sends is data: SGLang itself opens names of files, and addresses.
    assert request["image_data"] == ["data:image/png;base64,file:///etc/hostname", "data:image/png;base64,bbbb"]
    assert request["sampling_params"]["logit_bias"] == {"7": 1.0, "8": -1000.0, "9": -1000.0}
    assert SEEN.input_ids == [1, 9, 9, 9, 2, 9, 3]
    await replica.close()


async def test_the_identity_of_an_image_changes_with_the_weights() -> None:
    """SGLang keeps embeddings by this identity, and clears them at no update."""
    old, new = sglang(), sglang("1")
    first, again, later = (replica._request(SEEN)["mm_hashes"] for replica in (old, old, new))
    assert first == again
    assert len({*first, *later}) == 4
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in first)
    assert "mm_hashes" not in old._request(replace(SEEN, input_ids=[1, 2], image_data=[]))
    await old.close()
    await new.close()


@pytest.mark.parametrize(
    ("model_type", "image_cache", "renamed"),
    [("qwen2_5_vl", True, True), ("qwen2_5_vl", False, False), ("qwen3_vl", True, False)],
)
async def test_images_are_named_anew_only_where_that_is_needed_and_possible(
    model_type: str, image_cache: bool, renamed: bool
) -> None:
    replica = sglang(info=replace(INFO, model_type=model_type), image_cache=image_cache)
    assert ("mm_hashes" in replica._request(SEEN)) == renamed
    await replica.close()


@pytest.mark.parametrize(("read", "finish", "fits"), [(7, "length", True), (5, "length", False), (0, "abort", True)])
def test_a_prompt_that_was_read_at_another_length_is_refused(read: int, finish: str, fits: bool) -> None:
    answer = Answer(SEEN, str, None, incremental=False)
    meta: dict[str, Any] = {"prompt_tokens": read, "output_token_logprobs": [], "finish_reason": {"type": finish}}
    answer.take(orjson.dumps({"output_ids": [], "meta_info": meta}))
    if fits:
        assert answer.result().output_ids == []
    else:
        with pytest.raises(RequestError, match="5 prompt tokens instead of 7"):
            answer.result()


def test_a_model_with_images_starts_with_sglangs_own_code_and_without_a_cache_of_images() -> None:
    cpu, gpu = (ServerSettings(model="m", engine="sglang", device=device) for device in ("cpu", "cuda"))
    assert "--model-impl" in sglang_command(cpu, 0, 1)
    assert "--model-impl" not in sglang_command(cpu, 0, 1, images=True)
    assert "SGLANG_VLM_CACHE_SIZE_MB" not in sglang_environment(cpu)
    for settings in (cpu, gpu):
        assert sglang_environment(settings, images=True)["SGLANG_VLM_CACHE_SIZE_MB"] == "0"
        assert sglang_environment(settings, images=True)["SGLANG_MM_AVOID_RETOKENIZE"] == "1"
    assert "SGLANG_PLATFORM" not in sglang_environment(gpu, images=True)

    environment = sglang_environment(cpu, images=True)
    folder = Path(environment["PYTHONPATH"])
    (entry,) = distributions(path=[str(folder)])
    (point,) = entry.entry_points
    assert (point.group, point.name) == ("sglang.srt.platforms", environment["SGLANG_PLATFORM"])
    assert (folder / f"{point.module}.py").is_file()


def test_processes_of_tensor_parallelism_on_the_cpu_have_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {2, 3, 4, 5, 6, 7}, raising=False)
    settings = ServerSettings(model="m", engine="sglang", replicas=3, gpus_per_replica=2, threads=2)
    command = sglang_command(settings, 0, 1)
    assert command[command.index("--tp-size") + 1] == "2"
    bound = [sglang_environment(settings, index)["SGLANG_CPU_OMP_THREADS_BIND"] for index in range(3)]
    assert bound == ["2,3|4,5", "6,7|2,3", "4,5|6,7"], "replicas share the cores that there are"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in sglang_environment(ServerSettings(model="m", engine="sglang"))


async def test_no_tags_are_not_sent_because_sglang_takes_them_for_all() -> None:
    replica = SglangReplica(
        "r", "http://127.0.0.1:9", EngineInfo("sglang", "m", 1000, 500), on_gpu=True, overlap=True, tensor_parallel=1
    )
    try:
        await replica.memory("resume", [])  # a request would fail: nothing listens there
    finally:
        await replica.close()
