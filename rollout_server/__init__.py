"""The rollout server: tokens in, tokens out. It has no chat template, no tools and no rewards.

A request's life in eight steps:

1. `api/app.py` receives it; `api/auth.py` checks its token, `api/parsing.py` its JSON.
2. `api/generate.py` checks it against the model (vocabulary, context, `placeholders.py`) and makes
   a `Generation`.
3. `router/router.py` picks the replica that has the session's prefix, or the least loaded one.
4. `replica/` carries it there: `local.py` in this process, `http.py` and `sglang.py` elsewhere.
5. `engines/` samples its tokens, each with its logprob and the policy version that sampled it.
6. `router/partial_answer.py` keeps what arrives, and continues elsewhere if the replica dies.
7. `router/updates.py` may change the weights meanwhile: the answer then has several version spans.
8. `api/stream.py` encodes the answer; `errors.py` is the table of what can go wrong on the way.

A process's life: `commands.py` reads its options into `ServerSettings` (`settings.py`), `launch.py`
binds the port (`process.py`), starts the engine or the replicas (`replica/starting`), and serves
until it is stopped.
"""

AGENTLOOP_PACKAGE = "agentloop-rl"
