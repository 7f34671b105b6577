"""MCP servers as tools: one entry of the tool YAML brings all tools of a server.

The entry's `config` comes in; tools with the server's own schemas go out, and calls go to it.

    settings     `ServerSettings`: one server's part of `config`, or of a file `mcpServers`
    stdio        the transport to a program: bounded messages, and nothing left running
    remote       the transports to a URL: streamable HTTP and SSE
    connection   `Connection`: one client session, owned by one task, ended in every outcome
    places       `Places`: how many episodes have a session at a time, without deadlock
    server       `McpServer`: sessions by episode or shared, restarts, time limits
    content      what a server answers, as text and images for the model
    tool         `McpTools`, the entry of the YAML, and `McpTool`, one tool of it

Needs the library `mcp` (the extra `mcp`).
"""

from tools.mcp.tool import McpTool, McpTools

__all__ = ["McpTool", "McpTools"]
