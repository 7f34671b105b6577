"""Recipes: one folder is one task, made to be copied (`agentloop recipes copy NAME DIR`).

Each folder has files of the same names: `README.md`, `recipe.yaml` (the run), `data.py` (rows),
`reward.py`, `tools.yaml`, and where a task needs them `tool.py`, `interaction.py` and `sft.yaml`.
Beside the folders, two programs use the library from Python: `one_page.py` (all of GRPO) and
`rollout_only.py` (agent loops without a trainer).
"""

AGENTLOOP_PACKAGE = "agentloop-rl"
