"""From logits to tokens, for all rows of a batch at once.

In come logits [B, V] and the sampling parameters of each row; out go token ids and their logprobs.
`penalties.py` changes the logits of rows that set penalties, a bias or a minimum length;
`sampling.py` applies the temperature, draws, and truncates (top-p, top-k, min-p). Random numbers
are a function of seed and position, so a request samples the same tokens whatever runs beside it.
"""
