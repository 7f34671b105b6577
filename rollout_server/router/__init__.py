"""The router: every request goes to one replica, every administrative call to all that serve.

In: a `Generation` with its session, or an administrative call from `rollout_server.api`. Out: one
`GenerationResult`, even if replicas died in between.

`router.py` picks the replica of a session and sends the request again when that replica dies;
`partial_answer.py` keeps what was sampled until then. `members.py` holds the replicas: it admits
those that serve and fences those that failed. `updates.py` brings a new policy version to all of
them, and `checksums.py` compares what they confirm. `fleet.py` supervises replicas that are other
processes: it starts, probes and restarts them.
"""
