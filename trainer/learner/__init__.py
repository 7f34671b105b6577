"""A rank of the trainer: one process that holds a shard of the policy.

Of the trainer, only this folder imports torch. The main process of a run imports nothing from it
and sends messages to the ranks (`trainer.workers`); an import contract enforces this. The only
exception is `agentloop export`, which reads a checkpoint in its own process.

In: commands with samples as numpy columns. Out: sums for the metrics, logprobs, checkpoints, and
published weights.

1. `process`: the rank's program. It joins the process group and runs one command at a time.
2. `learner`: model, optimizer and gradients behind these commands.
3. `model/`: the policy over packed rows, sharded by FSDP2.
4. `loss`: the loss of each trained token, from the parts in `losses/`; `critic`: the value model.
5. `optim`: AdamW and its schedule.
6. `checkpoint`: saving while training continues, and resuming; `export`: a Hugging Face folder from
   a checkpoint.
7. `weights/`: publishing the policy to the engines.
"""
