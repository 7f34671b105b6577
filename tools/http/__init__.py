"""What tools in front of an HTTP service share: a rate limit, and a client that retries.

A tool's call comes in with the episode that makes it; the service's JSON answer goes out.

    rate_limit   `RateLimit`: a true rate and a number of requests in flight, fair between episodes
    service      `ServiceClient`: send a request, again if the service or the network failed
    options      read such a tool's `config`: unknown keys and wrong values are named

One instance belongs to one tool in one process: tools do not share a limit, and the whole run sends
`rate x processes` requests a second at most (`agents.workers` is the number of processes).
"""

from tools.http.options import Options
from tools.http.rate_limit import RateLimit
from tools.http.service import ServiceClient

__all__ = ["Options", "RateLimit", "ServiceClient"]
