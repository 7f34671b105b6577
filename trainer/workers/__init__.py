"""Workers: the main process's side of the trainer's ranks. No torch.

In: samples and commands. Out: sums, columns of numbers, checksums, and errors by name.

1. `rank`: one rank process. Start it, exchange messages with it over a socket, report its exit.
2. `watch`: wait for answers with a bound, and name the rank that hangs.
3. `starting`: start all ranks, and let those of several machines meet.
4. `samples`: check samples, divide them, and put the numbers that come back in their places.
5. `group`: `WorkerGroup`, all ranks together. Divide samples over them (`trainer.packing`), send
   each a command (`trainer.rank_commands`), and merge the answers. If one rank fails, end all.

The ranks' side is `trainer.learner.process`.
"""
