"""The KV cache: where keys and values of running and finished requests lie.

In come the ids of an admitted request; out goes a `Row`, which holds the tokens it shares with
earlier ones already. `prefix.py` finds the row that shares the longest prefix; `kv.py` places,
grows and releases rows within one budget of tokens; `rows.py` is a pool of rows of one capacity, in
the memory of `memory.py`. `model/attention.py` reads and writes the rows; a finished request's row
stays until its place is needed.
"""
