"""`ServerSettings`: how one server is reached, and how its tools are used."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentloop.errors import ToolConfigError
from agentloop.imports import MAX_BYTES
from agentloop.text import clean
from agentloop.tool.secrets import from_shell, resolved
from tools.http import Options

TRANSPORTS = {
    "http": "http", "streamable-http": "http", "streamable_http": "http", "streamableHttp": "http", "sse": "sse",
}  # fmt: skip

PREFIX = re.compile(r"[A-Za-z0-9_-]{0,32}")
SERVER_KEYS = ("command", "args", "env", "cwd", "url", "headers", "type", "transport", "auth_token")
SERVERS_KEYS = ("disabled", "description", "timeout", "name", "autoApprove", "alwaysAllow", "gallery", "version")
"""Keys of a server in such a file that other programs know, and that have no effect here."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One server. Either `command` or `url` is set.

    Attributes:
        name: for messages.
        command, args, env, cwd: the program of a stdio server.
        url, transport, headers: address of a server behind HTTP; `http` (streamable) or `sse`.
        tools: names of the tools that are offered; None: all.
        prefix: beginning of the names that the model sees.
        shared: one session for all episodes of this process, instead of one for each.
        stateful: the server remembers an episode; without its session the episode cannot go on.
        images: show the images of results to the model.
        timeout_s, start_timeout_s: of a call, and of a start.
        outage_s: how long to wait for a URL that cannot be reached.
        max_sessions: episodes that have a session at a time.
        workers, rate: calls in flight, and calls a second (None: no limit).
        secrets: values that no message may show.
    """

    name: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict, repr=False)
    cwd: Path | None = None
    url: str | None = None
    transport: str = "http"
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    tools: tuple[str, ...] | None = None
    prefix: str = ""
    shared: bool = False
    stateful: bool = False
    images: bool = True
    timeout_s: float = 30.0
    start_timeout_s: float = 60.0
    outage_s: float = 120.0
    max_sessions: int = 32
    workers: int = 128
    rate: float | None = None
    secrets: tuple[str, ...] = ()


def read_settings(config: Mapping[str, Any], folder: Path, where: str) -> list[ServerSettings]:
    """Read an entry's `config`: one server, or the servers of a file `{"mcpServers": {...}}`.

    Raises:
        ToolConfigError: names the key and what it may be.
    """
    options = Options(where, config)
    given = {key: config.get(key) for key in SERVER_KEYS if options.has(key) and key != "type"}
    file, selected = options.text("servers_file"), _names(config.get("tools"), f"{where}: config.tools")
    options.has("tools")
    if options.has("mcp"):  # the form of other frameworks
        other = config["mcp"]
        if not isinstance(other, Mapping) or not isinstance(other.get("mcp_servers_config_path"), str):
            raise ToolConfigError(f"{where}: mcp names no file", "write mcp: {mcp_servers_config_path: ./servers.json}")
        file = other["mcp_servers_config_path"]
        selected = _names(other.get("tool_selected_list"), f"{where}: mcp.tool_selected_list") or selected

    prefix = options.text("prefix") or ""
    if not PREFIX.fullmatch(prefix):
        raise ToolConfigError(f"{where}: config.prefix is {prefix[:80]!r}", "use letters, digits, _ and -")
    shared = options.text("session", "episode", choices=("episode", "shared")) == "shared"
    timeout = options.number("timeout", options.number("default_timeout", 30.0, 0, 86_400), 0, 86_400)
    common: dict[str, Any] = {
        "tools": selected,
        "prefix": prefix,
        "shared": shared,
        "images": options.flag("images", True),
        "timeout_s": timeout,
        "start_timeout_s": options.number("start_timeout", 60.0, 0, 86_400),
        "outage_s": options.number("outage_s", 120.0, 0, 604_800),
        "workers": options.whole("num_workers", 128, 1, 65_536),
        "rate": options.number("rate_limit", 1.0, 0, 1e6) if options.has("rate_limit") else None,
    }
    most = options.whole("max_sessions", 0, 0, 65_536)
    stateful = options.flag("stateful", True) if options.has("stateful") else None
    options.done(ignored=("name", "enable_global_rate_limit"))

    if (file is not None) == bool(given):
        raise ToolConfigError(
            f"{where}: config names {'both a server and a file of servers' if given else 'no server'}",
            "write command: [program, arguments], or url: http://host:port/mcp, or servers_file: servers.json",
        )
    servers: dict[str, tuple[dict[str, Any], tuple[str, ...]]]
    if file is None:
        servers = {str(given.get("url") or given.get("command")): (given, ())}
    else:
        servers = _servers_of(folder / Path(file).expanduser(), where)
    found = []
    for name, (server, secrets) in servers.items():
        label = name if file is not None else _label(given)
        read = _server(label, server, folder, f"{where}: {name}" if file is not None else where)
        read["max_sessions"] = most or (256 if read.get("url") else 32)
        read["stateful"] = not shared and (bool(read.get("command")) if stateful is None else stateful)
        found.append(ServerSettings(**{**common, **read}, secrets=secrets))
    return found


def _label(server: Mapping[str, Any]) -> str:
    """Return a name for messages, without credentials."""
    if isinstance(server.get("url"), str):
        return re.sub(r"(?<=//)[^/@]*@", "", server["url"].partition("?")[0])
    command = server.get("command")
    return Path(str(command[0] if isinstance(command, list) and command else command)).name


def _server(name: str, server: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    options = Options(where, server)
    command, arguments = server.get("command"), server.get("args")
    options.has("command"), options.has("args")
    headers, env = options.headers(), options.texts("env")
    url, cwd = options.text("url"), options.text("cwd")
    token = options.text("auth_token")
    kind = options.text("transport") or (server.get("type") if url is not None else None)
    options.done(ignored=SERVERS_KEYS)

    if command is not None and url is not None:
        raise ToolConfigError(f"{where} has both a command and a url", "a server has one of them: remove the other")
    if command is None and url is None:
        raise ToolConfigError(f"{where} needs a command or a url", "write one of them")
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise ToolConfigError(f"{where}: its url is not an HTTP address", "write url: http://host:port/mcp")
        if kind is not None and kind not in TRANSPORTS:
            kind = None if kind in ("mcp", "native") else kind
        if kind is not None and kind not in TRANSPORTS:
            raise ToolConfigError(f"{where}: config.transport is {str(kind)[:80]!r}", "one of: http, sse")
        if env or cwd or arguments:
            raise ToolConfigError(f"{where}: args, env and cwd belong to a command", "remove them")
        if token is not None:
            headers = {"Authorization": f"Bearer {token}", **headers}
        # A server with a token in such a file is one of SSE, where nothing else is said.
        transport = TRANSPORTS[kind] if kind is not None else "sse" if token is not None else "http"
        return {"name": name, "url": url, "transport": transport, "headers": headers}

    words = [command] if isinstance(command, str) else command
    if arguments is not None:
        words = [*words, *arguments] if isinstance(words, list) and isinstance(arguments, list) else None
    if not isinstance(words, list) or not words or not all(isinstance(word, str | int | float) for word in words):
        raise ToolConfigError(f"{where}: its command is not a list of words", "write command: [program, argument]")
    if headers or token:
        raise ToolConfigError(f"{where}: headers belong to a url", "give a program its secrets with env")
    program, *rest = (str(word) for word in words)
    if any("\0" in word for word in (program, *rest, *env, *env.values())) or any("=" in key for key in env):
        raise ToolConfigError(f"{where}: a word of its command or env cannot be passed to a program", "correct it")
    if "/" in program:
        program = str(folder / Path(program).expanduser())
    if isinstance(command, str) and len(command.split()) > 1 and shutil.which(program, path=env.get("PATH")) is None:
        first = clean(command.split()[0], 100)
        raise ToolConfigError(
            f"{where}: its command {clean(command, 200)!r} is the name of no program: it has arguments in it",
            f"write command: [{clean(', '.join(command.split()), 200)}], or command: {first} and the rest in args",
        )
    at = folder / Path(cwd).expanduser() if cwd is not None else None
    if at is not None and not at.is_dir():
        raise ToolConfigError(f"{where}: its cwd {at} is not a folder", "give an existing folder")
    return {"name": name, "command": program, "args": tuple(rest), "env": env, "cwd": at}


def _servers_of(path: Path, where: str) -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
    """Return the servers of a file `{"mcpServers": {name: {...}}}`, and the secrets of each."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ToolConfigError(f"{where}: {path} has more than {MAX_BYTES >> 20} MB", "give a file of settings")
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise ToolConfigError(
            f"{where}: {path}: {exc.strerror}", "name an existing file, relative to this one"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ToolConfigError(f"{where}: {path} is not JSON: {type(exc).__name__}", "correct it") from None
    servers = data.get("mcpServers") if isinstance(data, dict) else None
    if not isinstance(servers, dict) or not servers or not all(isinstance(each, dict) for each in servers.values()):
        raise ToolConfigError(f"{where}: {path} has no servers", 'write {"mcpServers": {"name": {"url": "..."}}}')
    return {
        name: resolved(from_shell(server), f"{where}: {path}, {name}")
        for name, server in servers.items()
        if not server.get("disabled")
    }


def _names(given: Any, what: str) -> tuple[str, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise ToolConfigError(f"{what} is not a list of names", "write [name, other_name]; null offers all")
    return tuple(given)
