"""What a user of weave writes: nested and async ops, an exception, an image, many calls, feedback."""

import asyncio
import contextlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import weave
from PIL import Image


@weave.op
def add(a: int, b: int) -> int:
    return a + b


@weave.op
async def plan(question: str) -> dict:
    await asyncio.sleep(0.01)
    return {"steps": [add(1, 2), add(3, 4)], "question": question}


@weave.op
async def agent(question: str) -> str:
    first, second = await asyncio.gather(plan(question), plan(question + "?"))
    return f"{first['steps']} {second['steps']}"


@weave.op
def broken(x: int) -> int:
    raise ValueError(f"no {x}")


@weave.op
def draw(size: int) -> Image.Image:
    return Image.new("RGB", (size, size), (255, 0, 0))


client = weave.init("lab/ops")
with weave.attributes({"step": 3, "agent_name": "tool_agent"}):
    answer, call = asyncio.run(agent.call("why"))
with contextlib.suppress(ValueError):
    broken(7)
draw(4)
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda i: add(i, i), range(200)))
call.feedback.add_reaction("👍")
call.feedback.add_note("a good one")
call.feedback.add("score", {"value": 0.5})
client.flush()


def calls(**arguments) -> list:
    return list(client.get_calls(**arguments))


def field(name):
    return {"$getField": name}


def literal(value):
    return {"$literal": value}


OP = "weave:///lab/ops/op/{}:*"
by_step = {"$expr": {"$eq": [field("attributes.step"), literal(3)]}}
tree = calls(query=by_step)
failed = calls(filter={"op_names": [OP.format("broken")]})[0]
image = calls(filter={"op_names": [OP.format("draw")]})[0].output
roots = client.get_calls(filter={"trace_roots_only": True})
big = calls(
    query={
        "$expr": {
            "$and": [
                {"$gte": [field("inputs.a"), literal(190)]},
                {"$not": [{"$gt": [field("output"), literal(390)]}]},
                {"$in": [field("inputs.b"), [literal(i) for i in range(180, 195)]]},
            ]
        }
    },
    sort_by=[{"field": "inputs.a", "direction": "desc"}],
)
contains = calls(query={"$expr": {"$contains": {"input": field("inputs.question"), "substr": literal("WHY?"),
                                                "case_insensitive": True}}})  # fmt: skip
again = client.get_call(call.id)
call.set_display_name("renamed")
print(
    json.dumps(
        {
            "call": call.id,
            "answer": answer,
            "tree": [[c.id, c.parent_id, c.op_name.split("/")[-1].split(":")[0], c.attributes["step"]] for c in tree],
            "traces": len({c.trace_id for c in tree}),
            "inputs": dict(again.inputs),
            "output": again.output,
            "latency_ms": again.summary["weave"]["latency_ms"],
            "status": again.summary["weave"]["status"].value,
            "exception": failed.exception,
            "failed": failed.summary["weave"]["status"].value,
            "image": [list(image.size), list(image.getpixel((0, 0)))],
            "roots": len(roots),
            "root_ids": len({c.id for c in roots}),
            "big": [c.inputs["a"] for c in big],
            "contains": [c.inputs["question"] for c in contains],
            "pages": [
                c.inputs["a"]
                for c in client.get_calls(
                    filter={"op_names": [OP.format("add")], "trace_roots_only": True},
                    limit=5,
                    offset=10,
                    sort_by=[{"field": "inputs.a", "direction": "asc"}],
                    page_size=2,
                    columns=["inputs.a"],
                )
            ],
            "feedback": [[f.feedback_type, f.payload] for f in again.feedback],
            "with_feedback": len(client.get_call(call.id, include_feedback=True).summary["weave"]["feedback"]),
            "renamed": client.get_call(call.id).display_name,
            "python": sys.version_info[:2],
        }
    )
)
