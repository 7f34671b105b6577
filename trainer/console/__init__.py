"""The console output of a command: phases, a line per step, decoded samples, a summary.

`console.py` owns the stream: it prints lines, and on a terminal a progress bar at the bottom. It is
the only file here that writes. `lines.py` (steps, evaluations) and `samples.py` (decoded episodes)
turn metrics and messages into lines. All text is treated as untrusted: control codes are removed,
and nothing is read as markup.
"""
