"""The reward of an episode.

In: task, last text, trajectory. Out: a number, or a dict with `score` and parts.

`loading.py` loads the function that the recipe names and chooses where it runs: event loop, threads
or processes. `calling.py` calls it and reads what it returns. `rescoring.py` scores stored episodes
again. `checks.py` refuses a wrong signature and finds what a function reads. `process.py`
sends task and trajectory to a worker process as JSON.

For rewards of several tasks: `boxed.py` finds the answer in `\\boxed{}`, `mathematics.py` compares
mathematical answers.
"""
