"""Start replicas: each `Source` starts one replica, and restarts it after it died.

In: the server's settings and the number of the replica. Out: a `Replica` that answers.

`base.py` is the protocol, and what all child processes have in common. `torch.py` starts `python -m
rollout_server` with one embedded engine, `sglang.py` starts SGLang's own server, `url.py` connects
to a server that someone else started. `sglang_cpu/` is imported by SGLang alone.
"""
