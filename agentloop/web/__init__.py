"""What the servers for people and tools share: the viewer, and the services behind tools.

A request passes `auth.py` (who may ask: the token, and no web page of another origin); `bodies.py`
reads its body within a bound; `refusals.py` are the error answers. `token.py` reads the token's
file. The rollout server has a gate of its own: it knows an admin token, and is on the hot path.
"""
