"""Estimators as pure functions: a file for each family, with formula and source. numpy only.

In: rewards, values, logprobs and counts. Out: advantages, penalties and weights.

1. `shaping`: changes of an episode's reward. `dynamic_sampling`: replacement of groups.
2. `kl`: estimators of a KL term, and its coefficient.
3. `advantage`: advantages from the rewards of a group, or from the rewards and values of tokens.
4. `aggregation`: reduction of token losses to one number. `ess`: effective sample size.

Losses and corrections, which need torch, are in `trainer.learner.losses`. docs/algorithms.md
explains when to use each.
"""

MAX_LOG_RATIO = 20.0
"""Bound on |log ratio| before `exp`, so that no single token makes the loss infinite."""
