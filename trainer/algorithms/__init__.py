"""Estimators, losses and corrections as pure functions: one file a family, formula and source in each docstring.

`advantage`, `kl` and `shaping` are read by the run's main process and import no torch; `policy_loss` and `mismatch` run
in the ranks. docs/algorithms.md says when to use which.
"""

MAX_LOG_RATIO = 20.0
"""Bound on |log ratio| before `exp`, so that one absurd token cannot turn the batch into inf."""
