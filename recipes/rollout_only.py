"""Run an agent loop over rows against a served model, and print what it did. No trainer, no GPU.

    agentloop serve --model recipes/quickstart/model --port 30000
    python recipes/rollout_only.py http://127.0.0.1:30000

The URL may also be that of a plain SGLang server that serves the same model.
"""

import asyncio
import sys
from pathlib import Path

from agentloop import rollout

TASK = Path(__file__).parent / "quickstart"


async def main(url: str) -> None:
    data, reward = f"{TASK}/data.py:val_rows", f"{TASK}/reward.py:score"
    episodes = rollout(url, data, model=TASK / "model", tools=TASK / "tools.yaml", reward=reward, max_rows=8, samples=2)
    async for episode in episodes:
        trajectory = episode[-1]
        print(f"row {trajectory.task_id}: {trajectory.status}, reward {trajectory.reward}, {trajectory.stop_reason}")
        for message in trajectory.messages:
            print(f"  {message['role']:9} {message['content']} {message.get('tool_calls', '')}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
