"""Run thousands of episodes on one event loop, and manage the processes around it.

`event_loop` runs the loop (uvloop, a garbage collector tuned for many live objects). `pacing`
schedules episodes in slices. `lag` measures how late the loop is and names the function that
blocked it. Blocking code of tools and rewards leaves the loop: `isolation` decides where it runs,
`threads` and `processes` run it, `process_worker` is the program in the child process, and `keeper`
ends everything that this one started. `child` starts, watches and ends every child process of the
project: isolated functions, the rollout server, its replicas, the trainer's ranks. `early` starts
those that import much before it is known what they shall do; `importer` is their program, and
`scan` spares them and others a scan of transformers' files.
"""
