"""Agent workers: processes that run whole episodes, on every core (docs/agent_workers.md).

    pool       `WorkerPool`, in the main process: tasks in, trajectories out; restarts what dies
    suspects   episodes that may be what ends their workers: run apart, until one is alone
    handle     one worker, seen from the main process
    process    the program of a worker: `python -m agentloop.worker`
    messages   between the two, in MessagePack; `tasks` and `episodes` pack rows and trajectories
    frames     a message on a socket
    limits     rate limits of tools, counted for all workers

Agent loops are Python, and one process runs them on one core. With workers, tools and rewards that
compute take more cores, and what blocks an event loop blocks one worker.
"""
