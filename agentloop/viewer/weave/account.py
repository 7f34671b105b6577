"""What weave's client asks before it traces: who the user is, and whether the project exists.

There are no accounts here: the user is always the same, and every project exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from agentloop.viewer.weave.feedback import USER
from agentloop.web.refusals import Refusal

OLDEST_CLIENT = "0.51.0"
"""Oldest weave whose requests are understood; its client refuses to trace if it is older."""

SERVER = "0.54.0"
"""Version of weave's trace server whose behaviour this one has."""


def server_info() -> dict[str, str]:
    """Return the versions that weave's client checks."""
    return {"min_required_weave_python_version": OLDEST_CLIENT, "trace_server_version": SERVER}


def graphql(body: Mapping[str, Any]) -> dict[str, Any]:
    """Answer the few GraphQL queries of weave's client.

    Raises:
        Refusal: it is another query.
    """
    query, given = body.get("query"), body.get("variables") or {}
    if not isinstance(query, str) or not isinstance(given, Mapping):
        raise Refusal(400, "a GraphQL request needs a query, and variables that are an object")
    data: dict[str, Any] = {}
    if re.search(r"\bupsertModel\s*\(", query):
        data["upsertModel"] = {"model": {"name": given.get("name"), "description": given.get("description") or ""}}
    elif re.search(r"\bproject\s*\(", query):
        data["project"] = {"name": given.get("name"), "artifact": None}
    if re.search(r"\bviewer\s*\{", query):
        data["viewer"] = {"username": USER, "defaultEntity": {"name": USER}}
    if re.search(r"\bentity\s*\(", query):
        data["entity"] = {"readOnly": False}
    if re.search(r"\bserverInfo\s*\{", query):
        data["serverInfo"] = {"frontendHost": ""}
    if not data:
        raise Refusal(400, "this server answers only the GraphQL queries of weave's client", "use weave, not wandb")
    return {"data": data}
