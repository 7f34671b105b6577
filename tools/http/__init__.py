"""Tools in front of an HTTP service: a rate limit and a client that retries, and a tool by YAML.

A tool's call comes in with the episode that makes it; the service's JSON answer goes out.

    service      `ServiceClient`: send a request, again if the service or the network failed
    failures     `ShownFailures`: what a run says of failures that only the model reads
    options      read such a tool's `config`: unknown keys and wrong values are named
    template     a URL, a query or a JSON body with places for arguments; a path into an answer
    tool         `HttpTool`: a service as a tool by YAML alone

`RateLimit` (agentloop/client/rate_limit.py) is a true rate and a number of requests in flight, fair
between episodes. One instance belongs to one tool: tools do not share a limit. A tool's limit is
that of the run, also where its episodes run in several processes.
"""

from agentloop.client.rate_limit import RateLimit
from tools.http.failures import ShownFailures
from tools.http.options import Options
from tools.http.service import ServiceClient
from tools.http.tool import HttpTool

__all__ = ["HttpTool", "Options", "RateLimit", "ServiceClient", "ShownFailures"]
