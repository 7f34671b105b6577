"""Published objects, a dataset, refs into it, an evaluation, and deletion."""

import asyncio
import json

import weave


class Settings(weave.Object):
    name: str = "settings"
    limits: dict
    tags: list[str]


client = weave.init("lab/objects")
ref = weave.publish(Settings(limits={"turns": 4}, tags=["a", "b"]), name="settings")
weave.publish(Settings(limits={"turns": 5}, tags=["a", "b"]), name="settings")
same = weave.publish(Settings(limits={"turns": 4}, tags=["a", "b"]), name="settings")
first = weave.ref("settings:v0").get()
latest = weave.ref("settings:latest").get()
dataset = weave.Dataset(name="rows", rows=[{"question": f"{i} + 1", "answer": i + 1} for i in range(5)])
data_ref = weave.publish(dataset)
rows = data_ref.get().rows


@weave.op
def exact(answer: int, output: int) -> dict:
    return {"right": answer == output}


@weave.op
def solve(question: str) -> int:
    return 3 if question == "2 + 1" else 0


summary = asyncio.run(weave.Evaluation(dataset=dataset, scorers=[exact]).evaluate(solve))
client.flush()
calls = list(client.get_calls(filter={"op_names": ["weave:///lab/objects/op/solve:*"]}))
expanded = list(
    client.get_calls(
        filter={"op_names": ["weave:///lab/objects/op/Evaluation.predict_and_score:*"]},
        columns=["inputs.example"],
        expand_columns=["inputs.example"],
    )
)
client.delete_calls([calls[0].id])
left = len(client.get_calls(filter={"op_names": ["weave:///lab/objects/op/solve:*"]}))
client.delete_object_version(ref)
try:
    ref.get()
    gone = "still there"
except Exception as exc:
    gone = type(exc).__name__
print(
    json.dumps(
        {
            "same": ref.digest == same.digest,
            "first": dict(first.limits),
            "latest": dict(latest.limits),
            "rows": [row["answer"] for row in rows],
            "length": len(rows),
            "right": summary["exact"]["right"],
            "solved": len(calls),
            "expanded": sorted(c.inputs["example"]["question"] for c in expanded),
            "left": left,
            "gone": gone,
        }
    )
)
