"""Prove, before a run starts, that a chat template keeps the token law.

A `ChatRenderer` and the run's tool schemas come in; a `Proof` goes out: a verdict, the reason for a
refusal, and what the template can render. The files, in the order in which they are used:

    conversations  `Abilities`: what the template can render; random probe conversations within them
    proof          `prove`: play each conversation as an episode and as one rendering, and compare
"""
