"""New weights over HTTP: each transport serves exactly the tensors that were published."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from agentloop.config.server import ServerSettings
from agentloop.weights.layout import checksum, digest_of, plan_file, read_layout
from agentloop.weights.shared import SharedWriter
from rollout_server.api.app import build_app
from rollout_server.engines.base import FolderWeights, SharedWeights
from rollout_server.engines.torch_engine.engine import TorchEngine
from rollout_server.engines.torch_engine.weights.loader import WeightLoader
from rollout_server.errors import WeightsError
from rollout_server.replica.local import LocalReplica
from rollout_server.router.router import Router
from tests.rollout_server.support import TOLERANCE, Reference, load, random_ids

PROMPT = random_ids(30, seed=3)


def tensors_of(folder: Path, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors") | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def checksum_of(tensors: dict[str, torch.Tensor]) -> str:
    digests = {
        name: digest_of(t.contiguous().reshape(-1).view(torch.uint8).numpy(), "uint8").value
        for name, t in tensors.items()
    }
    return checksum(digests)


def share(
    writer: SharedWriter, version: str, tensors: dict[str, torch.Tensor], pause: threading.Event | None = None
) -> None:
    """Write a version as a trainer does; with `pause`, wait for it before the last tensor."""
    described = [(name, str(t.dtype).removeprefix("torch."), t.shape) for name, t in tensors.items()]
    header, specs = plan_file(described)
    writer.open(header, specs[-1].end)
    for spec in specs:
        if pause is not None and spec is specs[-1]:
            assert pause.wait(20)
        data = tensors[spec.name].contiguous().reshape(-1).view(torch.uint8).numpy()
        writer.data[spec.begin : spec.end] = data
        writer.progress.reach(spec.end)
    writer.progress.finish(checksum_of(tensors))


class Server:
    """An engine behind the HTTP surface, and a folder that it may read."""

    def __init__(self, http: httpx.AsyncClient, engine: TorchEngine, root: Path) -> None:
        self.http = http
        self.engine = engine
        self.root = root
        self.slots = [SharedWriter(root / name) for name in ("even", "odd")]

    def share(self, version: int, tensors: dict[str, torch.Tensor], pause: threading.Event | None = None) -> Path:
        writer = self.slots[version % 2]
        writer.progress.begin(str(version))
        share(writer, str(version), tensors, pause)
        return writer.folder

    async def update(self, path: str, **request: Any) -> httpx.Response:
        return await self.http.post(f"/update_weights_from_{path}", json={"weight_version": "1", **request})

    async def generate(self, new: int = 8, **options: Any) -> dict[str, Any]:
        sampling = {"max_new_tokens": new, "ignore_eos": True, "sampling_seed": 1}
        answer = await self.http.post("/generate", json={"input_ids": PROMPT, "sampling_params": sampling, **options})
        return dict(answer.json())

    async def has_sampled(self, tokens: int) -> None:
        while self.engine.stats().sampled_tokens < tokens:  # noqa: ASYNC110  # the engine's thread sets no event
            await asyncio.sleep(0)

    async def version(self) -> str:
        return str((await self.http.get("/server_info")).json()["weight_version"])


@pytest.fixture
async def server(
    request: pytest.FixtureRequest, engine_factory: Callable[..., TorchEngine], tmp_path: Path
) -> AsyncIterator[Server]:
    engine = engine_factory(**getattr(request, "param", {}))
    root = tmp_path / "weights"
    app = build_app(Router([LocalReplica(engine)]), settings=ServerSettings(model="", weights_roots=(root,)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        yield Server(http, engine, root)


def private_mappings(folder: Path) -> list[range]:
    """Addresses at which this process has mapped the folder's file copy-on-write, as a reader does."""
    file = str(folder / "model.safetensors")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(file)]
    return [range(*(int(at, 16) for at in line[0].split("-"))) for line in lines if line[1].endswith("p")]


def error_of(answer: dict[str, Any], models: dict[str, Path]) -> float:
    """The largest difference between the logprobs of an answer and those of the versions that its spans name."""
    ids, meta = answer["output_ids"], answer["meta_info"]
    got = [logprob for logprob, _, _ in meta["output_token_logprobs"]]
    worst = 0.0
    for span in meta["weight_versions"]:
        expected = Reference(models[span["version"]]).logprobs(PROMPT + ids, len(PROMPT), 1.0)
        pairs = list(zip(got, expected, strict=True))[span["start"] : span["end"]]
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    return worst


@pytest.mark.parametrize("server", [{}, {"fast_path": False}], ids=["fast", "transformers"], indirect=True)
async def test_weights_in_shared_memory_are_served_where_they_lie(
    server: Server, model_dir: Path, other_weights: Path
) -> None:
    models = {"0": model_dir, "1": other_weights, "2": model_dir, "3": other_weights}
    for version in (1, 2, 3):
        tensors = tensors_of(models[str(version)])
        folder = server.share(version, tensors)
        answer = await server.update("tensor", shm_path=str(folder), weight_version=str(version))
        assert answer.json()["checksum"] == checksum_of(tensors)
        assert error_of(await server.generate(), models) < TOLERANCE
        parameters = dict(server.engine.model.named_parameters())
        addresses = [parameter.data_ptr() for parameter in parameters.values()]
        assert any(all(at in mapping for at in addresses) for mapping in private_mappings(folder))
        assert parameters["model.embed_tokens.weight"] is server.engine.model.lm_head.weight


async def test_weights_are_read_while_they_are_written_and_the_old_version_serves(
    server: Server, model_dir: Path, other_weights: Path
) -> None:
    models = {"0": model_dir, "1": other_weights}
    go_on = threading.Event()
    folder = server.slots[1].folder
    server.slots[1].progress.begin("1")
    updating = asyncio.create_task(server.update("tensor", shm_path=str(folder)))
    writing = asyncio.create_task(asyncio.to_thread(server.share, 1, tensors_of(other_weights), go_on))
    try:
        answer = await server.generate()
        assert answer["meta_info"]["weight_version"] == "0" and error_of(answer, models) < TOLERANCE
        assert not updating.done() and await server.version() == "0"
    finally:
        go_on.set()
        await writing
    assert (await updating).json()["weight_version"] == "1"
    assert error_of(await server.generate(), models) < TOLERANCE


@pytest.mark.parametrize("server", [{}, {"fast_path": False}], ids=["fast", "transformers"], indirect=True)
async def test_folders_one_after_the_other_use_two_places_in_memory(
    server: Server, model_dir: Path, other_weights: Path
) -> None:
    models = {"0": model_dir, "1": other_weights, "2": model_dir, "3": other_weights, "4": model_dir}
    places = []
    for version in (1, 2, 3, 4):
        folder = server.root / f"v_{version}"
        folder.mkdir()
        tensors = tensors_of(models[str(version)])
        save_file(tensors, folder / "model.safetensors")
        request = {"model_path": str(folder), "weight_version": str(version), "checksum": checksum_of(tensors)}
        assert (await server.update("disk", **request)).status_code == 200
        assert error_of(await server.generate(), models) < TOLERANCE
        places.append(next(server.engine.model.parameters()).data_ptr())
    assert places[0] == places[2] != places[1] == places[3]


@pytest.mark.parametrize("server", [{"dtype": "bfloat16"}, {}], ids=["bfloat16", "float32"], indirect=True)
async def test_another_dtype_is_cast(server: Server, other_weights: Path, tmp_path: Path) -> None:
    """A trainer in one precision, an engine in the other."""
    mine = next(server.engine.model.parameters()).dtype
    theirs = torch.bfloat16 if mine == torch.float32 else torch.float32
    tensors = {name: tensor.to(theirs) for name, tensor in tensors_of(other_weights).items()}
    answer = await server.update("tensor", shm_path=str(server.share(1, tensors)))
    assert answer.json()["checksum"] == checksum_of(tensors)
    served = server.engine.model.state_dict()
    assert {t.dtype for t in served.values()} == {mine}
    assert all(torch.equal(served[name], tensor.to(mine)) for name, tensor in tensors.items())


def without_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def one_too_many(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.nrom.weight"] = torch.ones(3)


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(3)


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][5] = float("nan")


FAULTS = [without_norm, one_too_many, of_another_shape, with_nan]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["disk", "tensor"])
async def test_weights_that_do_not_fit_are_refused_and_the_old_ones_serve(
    server: Server, model_dir: Path, fault: Callable[[dict[str, torch.Tensor]], None], way: str
) -> None:
    tensors = {name: tensor.clone() for name, tensor in tensors_of(model_dir).items()}
    fault(tensors)
    field = {"disk": "model_path", "tensor": "shm_path"}[way]
    answer = await server.update(way, **{field: str(server.share(1, tensors))})
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (400, field)
    assert "model.norm.weight" in error["message"] or "model.nrom.weight" in error["message"]
    assert await server.version() == "0"
    assert error_of(await server.generate(), {"0": model_dir}) < TOLERANCE


@pytest.mark.parametrize("way", ["disk", "tensor"])
async def test_another_checksum_is_refused(server: Server, model_dir: Path, other_weights: Path, way: str) -> None:
    folder = server.share(1, tensors_of(other_weights))
    field = {"disk": "model_path", "tensor": "shm_path"}[way]
    answer = await server.update(way, **{field: str(folder), "checksum": "xxh3:0000000000000000"})
    assert answer.status_code == 400 and "published xxh3:0000" in answer.json()["error"]["message"]
    assert await server.version() == "0"
    assert error_of(await server.generate(), {"0": model_dir}) < TOLERANCE


async def test_bytes_that_change_on_the_way_are_found(server: Server, model_dir: Path, other_weights: Path) -> None:
    folder = server.share(1, tensors_of(other_weights))
    spec = read_layout(folder / "model.safetensors")[3]
    server.slots[1].data[spec.begin] ^= 1
    answer = await server.update("tensor", shm_path=str(folder))
    assert answer.status_code == 400 and "was written" in answer.json()["error"]["message"]
    assert error_of(await server.generate(), {"0": model_dir}) < TOLERANCE


@pytest.mark.parametrize("way", ["disk", "tensor"])
async def test_a_part_of_a_file_is_refused(server: Server, other_weights: Path, way: str) -> None:
    folder = server.root / "part"
    folder.mkdir()
    data = (other_weights / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    answer = await server.update(way, **{{"disk": "model_path", "tensor": "shm_path"}[way]: str(folder)})
    assert answer.status_code == 400 and "cannot be read" in answer.json()["error"]["message"]
    assert await server.version() == "0"


async def test_a_trainer_that_gives_up_is_told_as_that(server: Server) -> None:
    server.slots[1].progress.begin("1")
    server.slots[1].progress.fail()
    answer = await server.update("tensor", shm_path=str(server.slots[1].folder))
    assert answer.status_code == 400 and "abandoned" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("way", "field"), [("disk", "model_path"), ("tensor", "shm_path")])
async def test_folders_outside_the_roots_are_not_read(
    server: Server, other_weights: Path, way: str, field: str
) -> None:
    (server.root / "link").symlink_to(other_weights)
    for path in (other_weights, server.root / "link", server.root / ".." / "elsewhere"):
        answer = await server.update(way, **{field: str(path)})
        assert (answer.status_code, answer.json()["error"]["field"]) == (403, field)
    assert (await server.update(way, **{field: str(server.root / "missing")})).status_code == 400


async def test_pickled_tensors_are_refused_with_the_reason(server: Server) -> None:
    request = {"serialized_named_tensors": ["gASVBQAAAAAAAABLAS4="], "load_format": "flattened_bucket"}
    answer = await server.update("tensor", **request)
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (400, "serialized_named_tensors")
    assert "unpickling" in error["message"] and "shm_path" in error["message"]


async def test_a_broadcast_needs_a_group_and_a_layout(server: Server) -> None:
    request = {"names": ["a"], "dtypes": ["float32"], "shapes": [[2]]}
    answer = await server.update("distributed", **request)
    assert (answer.status_code, answer.json()["error"]["field"]) == (409, "group_name")
    assert (await server.update("distributed", **{**request, "dtypes": []})).status_code == 400
    assert (await server.update("distributed", **{**request, "dtypes": ["float3"]})).json()["error"][
        "field"
    ] == "dtypes"
    assert (await server.http.post("/destroy_weights_update_group", json={})).status_code == 400
    join = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 2, "world_size": 2, "backend": "gloo"}
    answer = await server.http.post("/init_weights_update_group", json=join)
    assert (answer.status_code, answer.json()["error"]["field"]) == (409, "world_size")


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_an_update_in_the_middle_of_a_generation(
    server: Server, model_dir: Path, other_weights: Path, mode: str
) -> None:
    models = {"0": model_dir, "1": other_weights}
    folder = server.share(1, tensors_of(other_weights))
    stats = server.engine.stats
    generating = asyncio.create_task(server.generate(new=400))
    await server.has_sampled(10)
    answer = await server.update("tensor", shm_path=str(folder), running=mode)
    assert answer.status_code == 200
    result = await generating
    spans = result["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["0", "1"] and spans[1]["end"] == 400
    changed_at = spans[0]["end"]
    # How much was computed again: everything up to the change, or nothing.
    again = len(PROMPT) + changed_at - 1 if mode == "retract" else 0
    assert stats().prefilled_tokens == len(PROMPT) - 1 + again
    if mode == "retract":
        assert error_of(result, models) < TOLERANCE
    else:
        # Keys and values of the old weights stay: the first version's span is its own, the second one's a mixture.
        first = {**result, "meta_info": {**result["meta_info"], "weight_versions": spans[:1]}}
        assert error_of(first, models) < TOLERANCE < error_of(result, models)


async def test_wait_lets_requests_end_before_the_update(server: Server, model_dir: Path, other_weights: Path) -> None:
    folder = server.share(1, tensors_of(other_weights))
    generating = asyncio.create_task(server.generate(new=400))
    await server.has_sampled(10)
    await server.http.post("/pause_generation", json={"mode": "wait"})
    later = asyncio.create_task(server.generate())
    assert (await server.update("tensor", shm_path=str(folder))).status_code == 200
    await server.http.post("/continue_generation", json={})
    models = {"0": model_dir, "1": other_weights}
    for task, version in ((generating, "0"), (later, "1")):
        result = await task
        assert [span["version"] for span in result["meta_info"]["weight_versions"]] == [version]
        assert error_of(result, models) < TOLERANCE


def test_tied_weights_follow_under_either_name(model_dir: Path, other_weights: Path, tmp_path: Path) -> None:
    tensors = tensors_of(other_weights)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(model_dir).model
    loader = WeightLoader(model)
    loader.swap_in(loader.stage(FolderWeights(tmp_path)))
    assert torch.equal(model.get_input_embeddings().weight, tensors["lm_head.weight"])
    assert model.get_input_embeddings().weight is model.lm_head.weight


def test_a_tensor_that_lies_at_an_odd_place_is_copied(model_dir: Path, other_weights: Path, tmp_path: Path) -> None:
    data = (other_weights / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length] + b" " * 3
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    model = load(model_dir).model
    loader = WeightLoader(model)
    loader.swap_in(loader.stage(SharedWeights(tmp_path)))
    for name, tensor in tensors_of(other_weights).items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert model.state_dict()[name].data_ptr() % 4 == 0


def test_a_tensor_given_twice_is_refused(model_dir: Path, tmp_path: Path) -> None:
    for file in ("a", "b"):
        save_file({"model.norm.weight": torch.ones(32)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(WeightsError, match="twice"):
        WeightLoader(load(model_dir).model).stage(FolderWeights(tmp_path))
