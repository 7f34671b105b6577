"""A stdio server without the library, which answers as its first argument says."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

HOW = sys.argv[1]
TOOLS = [{"name": "act", "description": "Act.", "inputSchema": {"type": "object", "properties": {}}}]


def deep(levels: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return {"type": "object", "properties": {"x": schema}}


def send(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    if HOW == "hang":
        time.sleep(600)
    if HOW == "flood":
        while True:
            sys.stdout.write("no message\n" * 1000)
    if HOW == "endless":
        while True:
            sys.stdout.write("{" * 65536)
    listed = 0
    for line in sys.stdin:
        request = json.loads(line)
        method, number = request.get("method"), request.get("id")
        if method == "initialize":
            version = request["params"]["protocolVersion"]
            result: dict[str, object] = {
                "protocolVersion": version,
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "raw", "version": "1"},
            }
            if HOW == "greets":
                print("\x1b[31m[not json\n{neither}\n\xff", flush=True)
        elif method == "tools/list":
            listed += 1
            tools = [{**TOOLS[0], "inputSchema": deep(200)}] if HOW == "deep" else TOOLS
            if HOW == "twice":
                tools = TOOLS * 2
            if HOW == "named":
                tools = [{**TOOLS[0], "name": "do it, now"}]
            result = {"tools": tools, **({"nextCursor": str(listed)} if HOW == "endless pages" else {})}
            if HOW == "nothing":
                result = {"tools": []}
        elif method == "tools/call":
            if HOW == "floods when called":
                while True:
                    sys.stdout.write("no message\n" * 1000)
            if HOW == "busy":
                send({"jsonrpc": "2.0", "id": number, "error": {"code": -32000, "message": "no free worker"}})
                continue
            if HOW == "stops when called":
                os.kill(os.getpid(), signal.SIGSTOP)
            if HOW == "large":
                sys.stdout.write("{" + " " * 2**21)
                sys.stdout.flush()
            if HOW == "changed":
                send({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
            result = {"content": [{"type": "text", "text": "acted"}]}
            if HOW == "not a result":
                result = {"content": "acted"}
        elif number is None:
            continue
        else:
            send({"jsonrpc": "2.0", "id": number, "error": {"code": -32601, "message": "unknown"}})
            continue
        send({"jsonrpc": "2.0", "id": number, "result": result})


main()
