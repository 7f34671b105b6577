"""The index of a run's trace: sqlite beside the trace files, for filters, sorting and search.

It is a cache: everything in it comes from the trace files, and it is rebuilt when it is missing,
damaged or of another version. `refresh` brings it up to date, one trace file a transaction:
`rows.py` reads the file, `schema.py` has the tables, `database.py` the connections to them.
`query.py` turns a filter into SQL, `search.py` a reader's words into a full-text expression.
"""

from agentloop.trace.index.index import Page, TraceIndex
from agentloop.trace.index.query import CHOICES, RANGES, SORTS, EpisodeFilter, Sort
from agentloop.trace.index.schema import FACETS
from agentloop.trace.index.search import SearchError, match_expression
from agentloop.trace.index.tables import Failure

__all__ = [
    "CHOICES",
    "FACETS",
    "RANGES",
    "SORTS",
    "EpisodeFilter",
    "Failure",
    "Page",
    "SearchError",
    "Sort",
    "TraceIndex",
    "match_expression",
]
