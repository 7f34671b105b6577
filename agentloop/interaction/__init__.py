"""Simulated users and environments.

In: the conversation after a model's turn. Out: messages, a reward, "done".

`loading.py` finds interactions by the names that rows use: in the recipe's YAML, or among installed
packages. `base.py` is the class to subclass and its `Response`. `session.py` is one episode's
interaction, with retries, a timeout and checks of the answer.
"""
