"""Search, in the style of Search-R1: a tool that asks a retrieval server, and that server.

    tool       `SearchTool`: the model's queries to the server, its passages as text
    text       passages as the model reads them, cut by documents and tokens
    corpus     passages in a JSON-lines file
    encoder    texts to vectors
    index/     BM25 and dense indexes: building and opening
    server/    `POST /retrieve` over an index
    commands   `agentloop search index | serve`

The tool needs none of the server's libraries: `pip install 'agentloop-rl[search]'` brings them.
"""

from tools.search.tool import SearchTool

__all__ = ["SearchTool"]
