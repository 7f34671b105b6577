"""One episode: messages on the agent's side, token ids on the server's.

In: a task. Out: trajectories.

The files, in the order of use:

- `shared.py`   what all trajectories of an episode use, frozen: task, renderer, generator, tools,
  budget, seed.
- `branch.py`   what belongs to one trajectory: messages, ledger, images, rewards, metrics; fork and
  rewrite.
- `episode.py`  what an agent loop calls: `generate`, `call_tools`, `observe`, `respond`, `fork`.
- `messages.py` the one form of messages, whatever agents and interactions give.
- `images.py`   decodes the images of messages in threads, before they are rendered.
- `calls.py`    runs a turn's tool calls and writes their results as messages.
- `budget.py`   limits on turns, tokens and calls, and the reason that ends an episode.
- `ledger.py`   the only writer of ids, mask, logprobs and versions; append-only
  (`agentloop.columns`).
- `law.py`      checks the token law on finished trajectories, before they may be trained.
"""
