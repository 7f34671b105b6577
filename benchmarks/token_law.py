"""Check the token law (rules 1 to 5) over random episodes; a violation is printed and gives exit
code 1.

    python benchmarks/token_law.py --turns 1_000_000

Real: `EpisodeRunner`, `Episode`, `TokenLedger`, `ChatRenderer`, `ToolSession`, the Qwen tokenizer,
chat templates. Fake: the engine. It returns random ids of the whole vocabulary (control tokens
inside of turns, ids without a token), stops for random reasons, changes its policy version within a
turn, and breaks in some episodes. Observed messages are random tool results and user messages in
any script, with spelled control tokens. The checks are in `law_oracle.py`.

`--plant` breaks one thing on purpose; the program then has to find it and exit with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from law_material import BREAKS, LIMITS, SCHEMA, Chance, Engine, Follower, LookUp, Plan, Scripted
from law_oracle import TemplateOracle, Violation, check_episode, observed
from material import SHARED, add_tokenizer_option, existing, load_with_controls
from quick import QUICK, add_quick_option, expect

from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import ChatRenderer
from agentloop.client.client import GenerateResult
from agentloop.config import AgentConfig, SamplingConfig
from agentloop.errors import ModelError
from agentloop.tool.session import Toolset
from agentloop.types import Message, StopReason, Task, Trajectory
from agentloop.wire import SamplingParams

AT_ONCE = 64
"""Episodes that run side by side."""

ROWS_BEYOND = 267
"""A Qwen2.5 model has rows for 151,936 ids; its tokenizer has tokens for 151,669 of them."""

CONTEXT = 12_000
"""Context length of the fake model, in tokens."""

ONE_IN = 40
"""Text and ids around one in this many turns are compared with a whole rendering."""


class Planted:
    """An engine whose prompts or answers have one planted fault."""

    def __init__(self, engine: Engine, tokenizer: Any, fault: str) -> None:
        self._engine = engine
        self._backend = tokenizer.backend_tokenizer
        self._fault = fault

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, session_id: str, rid: str
    ) -> GenerateResult:
        ids = list(input_ids)[:-1] if self._fault == "prompt" else input_ids
        result = await self._engine.generate(ids, sampling, session_id=session_id, rid=rid)
        if self._fault == "retokenized":
            text = self._backend.decode(result.token_ids, skip_special_tokens=False)
            count = len(result.token_ids)
            encoded = [*self._backend.encode(text, add_special_tokens=False).ids, *[0] * count]
            result = replace(result, token_ids=encoded[:count])
        elif self._fault == "version" and result.versions:
            result = replace(result, versions=[result.versions[-1]] * len(result.versions))
        return result


class PlantedRenderer(ChatRenderer):
    """A renderer with one planted fault in the ids it appends."""

    fault = ""

    def extend(self, token_ids: Any, stop_reason: Any, messages: Any, tools: Any = None) -> list[int]:
        ids = super().extend(token_ids, stop_reason, messages, tools)
        if self.fault == "separator":  # drop the newline after the end-of-turn token
            return ids[:1] + ids[2:] if ids[0] == self.end_of_turn else ids[1:]
        text = self.decode(ids)
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # "control"


class PlantedRunner(EpisodeRunner):
    """A runner with one planted fault in its trajectories."""

    fault = ""

    async def run(self, *args: Any, **kwargs: Any) -> list[Trajectory]:
        trajectories = await super().run(*args, **kwargs)
        main = trajectories[-1]
        if self.fault == "fork" and len(trajectories) > 1:
            past = main.turns[0]  # the fork trains what it copied
            fork = trajectories[0]
            for column in ("loss_mask", "logprobs", "versions"):
                entries = list(getattr(fork, column))
                entries[past.start : past.end] = getattr(main, column)[past.start : past.end]
                setattr(fork, column, entries)
        elif self.fault == "length":
            main.versions = [*main.versions, None]
        elif self.fault == "silent" and main.error:
            main.error = None
        return trajectories


PLANTS = {
    "retokenized": 1,
    "version": 1,
    "prompt": 2,
    "separator": 3,
    "control": 3,
    "fork": 4,
    "length": 5,
    "silent": 5,
}
"""Faults that can be planted, and the rule that each one breaks."""


class Bench:
    """One chat template: runs random episodes with a real runner and checks them."""

    def __init__(self, name: str, template: str, tokenizer: Any, chance: Chance, plant: str | None) -> None:
        kind = PlantedRenderer if plant in ("separator", "control") else ChatRenderer
        self.renderer = kind(tokenizer, chat_template=template)
        self.renderer.fault = plant or ""  # type: ignore[union-attr]  # read by planted ones only

        self.oracle = TemplateOracle(name, tokenizer, template, self.renderer.end_of_turn)
        self._ends = sorted(self.oracle.closing) or self.renderer.stop_token_ids

        self.chance = chance
        self.engine = Engine()
        self.turns = self.episodes = 0
        self.statuses: Counter[str] = Counter()

        self._name = name
        self._tokenizer = tokenizer
        self._calls = self._spoken_calls() if self.oracle.call_text else []
        self._runners = {tools: self._runner(tools, plant) for tools in (True, False)}
        self._shapes = {
            True: self.oracle.shapes,
            False: [shape for shape in self.oracle.shapes if "tool" not in shape],
        }

    @property
    def tools(self) -> bool:
        return bool(self._calls) and ("tool",) in self.oracle.shapes

    def _runner(self, tools: bool, plant: str | None) -> EpisodeRunner:
        kind = PlantedRunner if plant in ("fork", "length", "silent") else EpisodeRunner
        runner = kind(
            renderer=self.renderer,
            generator=Planted(self.engine, self._tokenizer, plant) if plant else self.engine,
            agents=dict.fromkeys(LIMITS, Follower),
            limits={name: AgentConfig.model_validate(limits) for name, limits in LIMITS.items()},
            toolset=Toolset([LookUp(self.chance)] if tools else []),
            reward=None,
            context_length=CONTEXT,
        )
        runner.fault = plant or ""  # type: ignore[union-attr]  # read by planted ones only
        return runner

    def _spoken_calls(self) -> list[list[int]]:
        """Return calls as a model may sample them: cut at random and encoded piece by piece."""
        assert self.oracle.call_text is not None
        encode, random = self.oracle.encode, self.chance.random
        calls = []
        for number in range(200):
            text = self.oracle.call_text.replace("ORACLE-KEY", f"key {number}")
            pieces = self.renderer.parse(encode(text)).tool_calls
            if [call.arguments for call in pieces] != [{"key": f"key {number}"}]:
                return []
            head, middle, tail = text.partition(f"key {number}")
            cut = random.randrange(len(middle))
            calls.append([*encode(head), *encode(middle[:cut]), *encode(middle[cut:]), *encode(tail)])
        return calls

    def plan(self, group: str, tools: bool) -> Plan:
        """Return a random episode of 1 to 32 turns."""
        chance, random = self.chance, self.chance.random
        shapes = self._shapes[tools]
        version = int(random.random() * 1000)
        turns = []
        for _ in range(1 + int(random.random() * 32)):
            ids, logprobs = chance.sampled(chance.length())

            draw = random.random()
            stop = StopReason.STOP
            if tools and draw < 0.3:
                call = random.choice(self._calls)
                ids, logprobs = ids + call, [*logprobs, *chance.sampled(len(call))[1]]
            elif draw < 0.75:
                ids, logprobs = [*ids, random.choice(self._ends)], [*logprobs, -0.25]
            elif draw < 0.95 or not ids:
                stop = StopReason.LENGTH

            versions = [version] * len(ids)
            if ids and random.random() < 0.2:  # a weight update within the turn
                cut = int(random.random() * len(ids))
                version += 1
                versions[cut:] = [version] * (len(ids) - cut)

            new = [observed(role, chance.text()) for role in shapes[int(random.random() * len(shapes))]]
            turns.append(Scripted(ids, logprobs, versions, stop, new))

        if random.random() < 0.03:
            turns[int(random.random() * len(turns))].breaks = random.choice(BREAKS)
        fork_after = 1 + int(random.random() * (len(turns) - 1)) if len(turns) > 1 and random.random() < 0.1 else None
        plan = Plan(self._name, turns, fork_after)
        self.engine.plans[f"{group}/0"] = plan
        return plan

    async def batch(self) -> None:
        """Run `AT_ONCE` episodes side by side and check each.

        Raises:
            Violation: the first violation found.
        """
        random, chance = self.chance.random, self.chance
        self.engine.plans.clear()
        jobs = []
        for number in range(AT_ONCE):
            group = f"{self._name}{self.episodes + number}"
            tools = self.tools and random.random() < 0.7
            plan = self.plan(group, tools)
            prompt: list[Message] = [{"role": "user", "content": chance.text()}]
            if random.random() < 0.5:
                prompt.insert(0, {"role": "system", "content": chance.text() or "Answer."})
            agent = random.choice(("roomy", "roomy", "few_turns", "few_tokens"))
            task = Task(group, agent, prompt, extra_info={"plan": plan})
            jobs.append((plan, task, group, tools))

        sampling = SamplingConfig(max_new_tokens=512)
        results = await asyncio.gather(
            *(
                self._runners[tools].run(task, group_id=group, sample_index=0, sampling=sampling, seed=1)
                for _, task, group, tools in jobs
            )
        )

        for (plan, task, group, tools), trajectories in zip(jobs, results, strict=True):
            sample = [random.random() * ONE_IN < 1 for _ in range(len(plan.turns) + 1)]
            try:
                self.turns += check_episode(
                    plan, trajectories, self.oracle, task.prompt, [SCHEMA] if tools else None, sample
                )
            except Violation as exc:
                raise Violation(exc.rule, f"{exc.text} (template {self._name}, episode {group})") from exc
            self.statuses[f"{trajectories[-1].status.value}/{trajectories[-1].stop_reason.value}"] += 1
        self.episodes += AT_ONCE


def benches(options: argparse.Namespace) -> list[Bench]:
    """Return one bench for each template that the renderer accepts; print the refusals."""
    folder = existing(options.templates, "--templates")
    templates = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    tokenizer = load_with_controls(options.tokenizer, templates)
    controls = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
    chance = Chance(options.seed, len(tokenizer) + ROWS_BEYOND, controls)

    made = []
    for name, template in templates.items():
        if options.template and name not in options.template:
            continue
        try:
            bench = Bench(name, template, tokenizer, chance, options.plant)
        except ModelError as exc:
            print(f"{name:22} refused by the renderer: {str(exc).splitlines()[0][:90]}")
            continue
        shapes = ", ".join("+".join(shape) for shape in bench.oracle.shapes)
        print(f"{name:22} {'tool calls' if bench.tools else 'no tool calls'}; observed: {shapes}")
        made.append(bench)
    if not made:
        raise SystemExit(f"no template in {folder} is accepted: see --templates and --template")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1_000_000, help="total number of random turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--templates", type=Path, default=SHARED / "chat_templates", help="folder of *.jinja")
    parser.add_argument("--template", nargs="+", help="use only these templates, by file name")
    parser.add_argument(
        "--plant", choices=sorted(PLANTS), help="plant this fault: exit code 1 is then the correct result"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    add_tokenizer_option(parser)
    add_quick_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.turns = 400

    running = benches(options)
    wall, cpu, printed = time.perf_counter(), time.process_time(), 0.0
    done = 0
    try:
        while done < options.turns:
            for bench in running:
                asyncio.run(bench.batch())
            done = sum(bench.turns for bench in running)
            if time.perf_counter() - printed > 10:
                printed = time.perf_counter()
                print(f"{done:>10,} turns, {done / (time.process_time() - cpu):,.0f} a second of CPU", flush=True)
    except Violation as exc:
        print(f"VIOLATION of {exc}; after {sum(bench.turns for bench in running):,} turns")
        sys.exit(1)

    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    episodes = sum(bench.episodes for bench in running)
    checked = sum(bench.oracle.checked for bench in running)
    print(f"{done:,} random turns in {episodes:,} episodes over {len(running)} templates: 0 violations")
    print(f"{done / cpu_seconds:,.0f} turns a second of CPU, {done / seconds:,.0f} a second, checks included")
    print(f"{checked:,} places compared in full with whole renderings, the control tokens of all places")
    print(
        "episodes ended as: "
        + ", ".join(f"{n:,} {how}" for how, n in sum((b.statuses for b in running), Counter()).most_common())
    )

    if options.json:
        figures = {"turns": done, "episodes": episodes, "seconds": seconds, "cpu_s": cpu_seconds, "violations": 0}
        options.json.write_text(json.dumps(figures), encoding="utf-8")

    expect("at least as many turns as asked for", done >= options.turns, True)
    expect("every template was run and checked", all(b.turns > 0 and b.oracle.checked > 0 for b in running), True)
    if options.quick:
        print(QUICK)

    # No violation was found, so a planted fault was missed.
    if options.plant:
        print(f"the planted fault {options.plant!r} was not found")
        sys.exit(3)


if __name__ == "__main__":
    main()
