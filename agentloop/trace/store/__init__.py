"""The store of traces in a run directory: parquet files that common tools read without our code.

store         `TraceStore`: write, read, scan, rewind, name what is cut
schema        the columns
encode        records -> table          tokens      columns of ids, mask, logprobs, versions
decode        table -> records          exact_json  JSON that keeps NaN and large integers
writer        table -> file             choice      the groups that `trace.max_bytes_per_step`
files         names of files, metadata              has room for
images        traces/images             old_form    JSON lines of earlier versions
"""

from agentloop.trace.store.checks import Problem
from agentloop.trace.store.files import TraceFile
from agentloop.trace.store.schema import CHEAP, SCHEMA
from agentloop.trace.store.store import TraceStore
from agentloop.trace.store.writer import Written

__all__ = ["CHEAP", "SCHEMA", "Problem", "TraceFile", "TraceStore", "Written"]
