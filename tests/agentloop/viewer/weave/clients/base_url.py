"""A user of weave who set WANDB_BASE_URL only."""

import json

import weave
from weave.trace.env import weave_trace_server_url


@weave.op
def add(a: int, b: int) -> int:
    return a + b


client = weave.init("lab/base")
add(2, 3)
ref = weave.publish({"turns": 4}, "settings")
client.flush()
found = {"calls": [call.output for call in client.get_calls()], "object": dict(ref.get())}
print(json.dumps({"server": weave_trace_server_url(), **found}))
