"""Where the processes of a run are: on this machine, or on a Ray cluster (docs/cluster.md).

Ray places processes, starts and stops them, and notices when they die. What they say to each other
goes its own way: HTTP for tokens, sockets and collectives for tensors. Nothing is pickled but the
commands to start.

1. `opening`: the launcher that the recipe names, for the length of a run.
2. `session`: join a cluster, or the one that `own` starts for this run.
3. `needs`: what the run asks of the cluster, and what the cluster lacks.
4. `placement`: reserve it, with a bound, and say who goes where.
5. `interpreters`: refuse nodes whose Python, packages or code differ from this machine's.
6. `ray`: `RayLauncher`, which starts processes in what was reserved.
7. `supervisor`: the actor beside each of them, in its node.
"""
