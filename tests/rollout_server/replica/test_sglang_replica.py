"""A bare SGLang as a replica: what is decided without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.config.server import ServerSettings
from rollout_server.engines.base import EngineInfo, FolderWeights
from rollout_server.errors import WeightsError
from rollout_server.replica.sglang import SglangReplica
from rollout_server.replica.starting.sglang import sglang_command


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
