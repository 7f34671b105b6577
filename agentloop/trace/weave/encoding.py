"""Complete calls as the JSON that weave's server takes."""

from __future__ import annotations

from typing import Any

import orjson

from agentloop.trace.store.exact_json import has_odd_float


def encoded(call: dict[str, Any]) -> bytes:
    """Return a complete call as JSON, equal to what weave's client writes.

    Raises:
        ValueError: it holds a NaN or an infinity, which JSON has not.
    """
    try:
        data = orjson.dumps(call, option=orjson.OPT_UTC_Z)
    except TypeError:  # a lone surrogate, an integer of more than 64 bits, a key that is not text
        return _by_weave(call)
    # orjson writes null for NaN. Most calls have no more nulls than empty fields.
    odd = data.count(b"null") > list(call.values()).count(None) and has_odd_float(call)
    return _by_weave(call) if odd else data


def _by_weave(call: dict[str, Any]) -> bytes:
    from pydantic_core import to_jsonable_python
    from weave.vendor.weave_server_sdk._utils._json import openapi_dumps

    data: bytes = openapi_dumps(to_jsonable_python(call))
    return data
