"""The KV cache: keys and values of running and finished requests.

In: the ids of an admitted request. Out: a `Row`, which already holds the tokens that it shares with
earlier requests. `prefix.py` finds the row that shares the longest prefix; `kv.py` places, grows
and releases rows within one budget of tokens; `rows.py` is a pool of rows of one capacity, in the
memory of `memory.py`. `model/attention.py` reads and writes the rows; a finished request's row
stays until its space is needed.
"""
