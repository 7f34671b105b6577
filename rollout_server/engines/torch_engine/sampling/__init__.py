"""From logits to tokens, for all rows of a batch at once.

In: logits [B, V] and each row's sampling parameters. Out: token ids and their logprobs.
`penalties.py` changes the logits of rows that set penalties, a bias or a minimum length;
`sampling.py` applies the temperature, draws, and truncates (top-p, top-k, min-p). Random numbers
are a function of seed and position, so a request samples the same tokens whatever else runs.
"""
