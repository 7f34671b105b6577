"""A rank of the trainer: one process that holds a shard of the policy.

This folder is the wall: torch lives here only. The main process of a run imports nothing of it and
talks to ranks by messages (`trainer.workers`); an import contract keeps it so. The one door is
`agentloop export`, which reads a checkpoint in its own process.

In: commands with samples as numpy columns. Out: sums for the metrics, logprobs, checkpoints, and
published weights.

1. `process`: the rank's program. It joins the process group and answers commands one by one.
2. `learner`: model, optimizer and gradients behind these commands.
3. `model/`: the policy over packed rows, sharded by FSDP2.
4. `loss`: the loss of each trained token, from the parts in `losses/`; `critic`: the value model.
5. `optim`: AdamW and its schedule.
6. `checkpoint`: saving while training continues, and resuming; `export`: a Hugging Face folder from
   a checkpoint.
7. `weights/`: publishing the policy to the engines.
"""
