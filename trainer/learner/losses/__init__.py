"""Losses of trained tokens: small pure functions of torch tensors, each with its source.

In: logprobs, advantages and the engine's logprobs of a micro-batch's trained tokens (N). Out: one
number for each token. `trainer.learner.loss` combines them as the recipe specifies.

1. `ratios`: bounded ratios, and sums and means over a token's sample.
2. `policy_loss`: PPO clip, GSPO, CISPO, plain policy gradient.
3. `mismatch`: importance weights and masks where engine and trainer disagree.
4. `value_loss`: the critic's.

Advantages, KL estimates and aggregation need no torch: they are in `trainer.algorithms`.
"""
