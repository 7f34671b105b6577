"""Measure images from the row to the trained token, on one core, beside transformers.

    python benchmarks/vision.py [--json FILE] [--quick]

A random Qwen2.5-VL of a few million parameters, and photographs of noise and gradients in JPEG, a
different one for each episode. Seconds are CPU time of one process on one thread.

load         an image as a row holds it becomes the file that is sent: `read_image` where an image
             has to be changed, and the base64 of the request
preprocess   the rollout server's `PromptImageReader.read`, from base64 to patches and positions,
             beside transformers' own image processor on opened images
engine       prompts of one image through the torch engine, prefill and `NEW` tokens, 16 at a time,
             beside `generate` of the same model with the same patches, also 16 at a time
train        forward and backward of the same prompts, packed, beside transformers' own forward and
             backward, one sample at a time (padding a batch would make it slower)
episodes     `EPISODES` episodes of `SHOWN` images each at once, one after another in its turns,
             against a client that answers at once: event-loop lag, and bytes of memory an image

Exit code 1: the event loop's lag is over its bound.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import io
import json
import os
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quick import QUICK, add_quick_option, expect, expect_between
from quiet import OtherLoad

SIZE = (560, 420)
"""Pixels of an image: 300 tokens at 28 x 28 pixels a token."""

TOKENS = 300
IMAGES, NEW, EPISODES, SHOWN = 48, 16, 512, 3
PAD, START, END, VOCAB = 151, 153, 154, 160
BOUND_LAG_S = 0.05

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def photographs(count: int) -> list[bytes]:
    """JPEG files that differ."""
    from PIL import Image

    files = []
    for seed in range(count):
        rough = Image.frombytes("RGB", (20, 15), random.Random(seed).randbytes(20 * 15 * 3))
        buffer = io.BytesIO()
        rough.resize(SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def save_model(folder: Path) -> Path:
    """A random Qwen2.5-VL with its image processor: 256 wide, 4 layers, a tower of 4."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 4096, "bos_token_id": None,
            "eos_token_id": 7, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 4, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "patch_size": 14,
            "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [3], "out_hidden_size": 256,
        },
        image_token_id=PAD, video_token_id=PAD + 1, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=14, size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    ).save_pretrained(folder)
    return folder


def prompt(seed: int) -> list[int]:
    text = random.Random(seed)
    words = [text.randrange(8, PAD) for _ in range(24)]
    return [*words[:12], START, *[PAD] * TOKENS, END, *words[12:]]


def per_second(count: int, work: Callable[[], Any]) -> float:
    """Images a second of CPU time."""
    gc.collect()
    begin = time.process_time()
    work()
    return count / (time.process_time() - begin)


def opened(files: Sequence[bytes]) -> list[Any]:
    from PIL import Image

    return [Image.open(io.BytesIO(data)).convert("RGB") for data in files]


def measure_load(files: Sequence[bytes]) -> dict[str, float]:
    from agentloop.images import image_data, open_image

    return {
        "to the request": per_second(len(files), lambda: [image_data({"bytes": data}) for data in files]),
        "decoded by Pillow": per_second(len(files), lambda: [open_image(data).convert("RGB") for data in files]),
    }


def measure_preprocess(files: Sequence[bytes], loaded: Any, processor: Any) -> dict[str, float]:
    texts = [base64.b64encode(data).decode() for data in files]
    ids = [prompt(seed) for seed in range(len(files))]

    def theirs() -> None:
        for image in files:
            made = processor(images=opened([image]), return_tensors="pt")
            expect("tokens of an image", int(made["image_grid_thw"].prod()) // 4, TOKENS)

    return {
        "ours": per_second(len(files), lambda: [loaded.images.read(i, [t]) for i, t in zip(ids, texts, strict=True)]),
        "ours, seen before": per_second(
            len(files), lambda: [loaded.images.read(i, [t]) for i, t in zip(ids, texts, strict=True)]
        ),
        "transformers": per_second(len(files), theirs),
    }


def measure_engine(files: Sequence[bytes], loaded: Any, folder: Path, processor: Any) -> dict[str, float]:
    import torch
    from transformers import AutoModelForImageTextToText

    from agentloop.wire import SamplingParams
    from rollout_server.engines.base import Generation
    from rollout_server.engines.torch_engine.cache.kv import build_cache
    from rollout_server.engines.torch_engine.core import Core
    from rollout_server.engines.torch_engine.model.models import slow_runner

    cache = build_cache(loaded.kv, 1024, max_running=16, max_kv_tokens=32_768, memory_bytes=2**31)
    core = Core(
        slow_runner(loaded), cache, eos_ids=frozenset(), max_running=16, device=torch.device("cpu"),
        never_sampled=loaded.placeholders.never_sampled,
    )  # fmt: skip
    texts = [base64.b64encode(data).decode() for data in files]
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    greedy = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
    answers: dict[str, list[list[int]]] = {"ours": [], "theirs": []}

    def ours() -> None:
        running = []
        for seed, text in enumerate(texts):
            ids = prompt(seed)
            asked = Generation(str(seed), ids, greedy, image_data=[text])
            running.append(core.add(asked, loaded.images.read(ids, [text])))
        while core.busy:
            core.step()
        answers["ours"] = [one.result.output_ids for one in running]

    def theirs() -> None:
        for first in range(0, len(files), 16):
            made = processor(images=opened(files[first : first + 16]), return_tensors="pt")
            ids = torch.tensor([prompt(seed) for seed in range(first, min(first + 16, len(files)))])
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == PAD).int(), **made,
                max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
                suppress_tokens=[PAD, PAD + 1],
            )  # fmt: skip
            answers["theirs"] += out[:, ids.shape[1] :].tolist()

    found = {"ours": per_second(len(files), ours), "transformers": per_second(len(files), theirs)}
    same = sum(a == b for a, b in zip(answers["ours"], answers["theirs"], strict=True))
    expect_between("share of equal answers", same / len(files), 0.9, 1.0)
    return found


def measure_train(files: Sequence[bytes], folder: Path, processor: Any) -> dict[str, float]:
    import numpy as np
    import torch
    from torch import distributed
    from transformers import AutoModelForImageTextToText

    from agentloop.config import TrainerConfig
    from trainer.learner.learner import Learner, LearnerSettings
    from trainer.types import LossSpec, TrainSample

    store = distributed.FileStore(str(folder / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    config = TrainerConfig.model_validate({"freeze_vision": False})
    learner = Learner(
        LearnerSettings(model_path=str(folder), config=config, dtype="float32", total_steps=1, seed=0, reference=False)
    )
    samples = []
    for seed, data in enumerate(files):
        ids = np.array([*prompt(seed), *range(20, 20 + NEW)], dtype=np.int32)
        mask = np.arange(len(ids)) >= len(ids) - NEW
        samples.append(
            TrainSample(
                token_ids=ids, loss_mask=mask, old_logprobs=np.where(mask, -5.0, 0.0).astype(np.float32),
                advantages=mask.astype(np.float32), prompt_length=len(ids) - NEW, group_key=seed,
                images=(np.frombuffer(data, dtype=np.uint8),),
            )
        )  # fmt: skip
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)

    def theirs() -> None:
        for sample, data in zip(samples, files, strict=True):
            ids = torch.from_numpy(sample.token_ids).long()[None]
            made = processor(images=opened([data]), return_tensors="pt")
            logits = model(input_ids=ids, mm_token_type_ids=(ids == PAD).int(), **made).logits[0, -NEW - 1 : -1]
            torch.nn.functional.cross_entropy(logits, ids[0, -NEW:]).backward()

    found = {
        "ours": per_second(len(files), lambda: learner.accumulate(samples, 1.0, LossSpec())),
        "transformers": per_second(len(files), theirs),
    }
    distributed.destroy_process_group()
    return found


def measure_episodes(files: Sequence[bytes], episodes: int, tokenizer_folder: Path) -> dict[str, float]:
    from agentloop.agent.base import AgentLoop
    from agentloop.agent.runner import EpisodeRunner
    from agentloop.chat import ChatRenderer, load_tokenizer
    from agentloop.chat.images import ImageTokens
    from agentloop.config import AgentConfig, SamplingConfig
    from agentloop.episode.episode import Episode
    from agentloop.runtime.event_loop import run_loops
    from agentloop.runtime.lag import LoopLagMonitor
    from agentloop.testing import FakeGenerator
    from agentloop.tool.session import Toolset
    from agentloop.types import Task

    class Looking(AgentLoop):
        async def run(self, episode: Episode) -> None:
            for image in episode.task.extra_info["later"]:
                await episode.generate()
                episode.observe({"role": "user", "content": [{"type": "image", "image": image}]})
            await episode.generate()

    tokenizer = load_tokenizer(str(tokenizer_folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]})
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    images = ImageTokens(pad, lambda height, width: height * width // 28**2)
    renderer = ChatRenderer(tokenizer, chat_template=TEMPLATE, images=images)
    runner = EpisodeRunner(
        renderer=renderer, generator=FakeGenerator(lambda _: [5, 6, renderer.end_of_turn or 0]), toolset=Toolset(),
        agents={"looking": Looking}, limits={"looking": AgentConfig(max_response_tokens=2048)}, reward=None,
        context_length=4096,
    )  # fmt: skip

    def task(number: int) -> Task:
        # A copy for each episode: none may share the image of another by identity.
        first, *later = (bytes(bytearray(files[(number * SHOWN + i) % len(files)])) for i in range(SHOWN))
        content = [{"type": "image", "image": first}, {"type": "text", "text": "What is it?"}]
        message: Any = {"role": "user", "content": content}
        return Task(task_id=str(number), agent_name="looking", prompt=[message], extra_info={"later": later})

    async def run() -> float:
        """Run them all at once; return the longest lag of the event loop."""
        with LoopLagMonitor(BOUND_LAG_S) as lag:
            done = await asyncio.gather(
                *(runner.run(one, group_id=one.task_id, sample_index=0, sampling=SamplingConfig()) for one in tasks)
            )
            longest = lag.take()["loop/lag_max_s"]
        expect("episodes that are well", {trajectory.status.value for (trajectory,) in done}, {"ok"})
        expect("images of an episode", {len(trajectory.images) for (trajectory,) in done}, {SHOWN})
        held.append(done)
        return longest

    # As in a run, whose main process has neither torch nor a model that the collector would scan.
    gc.collect()
    gc.freeze()
    tasks, held = [task(0)], []
    run_loops(run())  # warm-up
    tasks = [task(number) for number in range(episodes)]
    longest = run_loops(run())

    # In a round of its own: tracing makes everything slower.
    held.clear()
    tracemalloc.start()
    run_loops(run())
    size = tracemalloc.get_traced_memory()[0] / (episodes * SHOWN)
    tracemalloc.stop()
    return {"bytes an image": size, "file of an image": len(files[0]), "longest lag, s": longest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    add_quick_option(parser)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    import torch
    from transformers import AutoImageProcessor

    from rollout_server.engines.torch_engine.model.models import load_model

    torch.set_num_threads(1)
    files = photographs(4 if options.quick else IMAGES)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, OtherLoad() as others:
        folder = save_model(Path(name))
        loaded = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"), context_length=1024)
        processor = AutoImageProcessor.from_pretrained(folder)
        figures["load"] = measure_load(files)
        figures["preprocess"] = measure_preprocess(files, loaded, processor)
        figures["engine"] = measure_engine(files, loaded, folder, processor)
        figures["train"] = measure_train(files, folder, processor)
        quickstart = Path(__file__).parents[1] / "recipes/quickstart/model"
        figures["episodes"] = measure_episodes(files, 8 if options.quick else EPISODES, quickstart)
    figures["other load, cores"] = others.cores

    for part, numbers in figures.items():
        if isinstance(numbers, dict):
            unit = "" if part == "episodes" else " images/s"
            print(f"{part:12}" + "; ".join(f"{key}: {value:,.3g}{unit}" for key, value in numbers.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2))
    if options.quick:
        print(QUICK)
        return 0
    print(f"others used {others.cores or 0:.2f} cores")
    return int(figures["episodes"]["longest lag, s"] > BOUND_LAG_S)


if __name__ == "__main__":
    raise SystemExit(main())
