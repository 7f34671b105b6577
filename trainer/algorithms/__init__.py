"""Estimators as pure functions: a file for each family, with formula and source. numpy only.

In: rewards, values, logprobs and counts. Out: advantages, penalties and weights.

1. `shaping`: changes of an episode's reward. `dynamic_sampling`: groups that are sampled again.
2. `kl`: estimators of a KL term, and its coefficient.
3. `advantage`: from the rewards of a group, or the rewards and values of tokens, to advantages.
4. `aggregation`: from losses of tokens to one number. `ess`: effective sample size.

Losses and corrections, which need torch, are in `trainer.learner.losses`. docs/algorithms.md says
when to use which.
"""

MAX_LOG_RATIO = 20.0
"""Bound on |log ratio| before `exp`, so that no single token makes the batch infinite."""
