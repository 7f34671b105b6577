"""The tool interface; the tools are in the folder `tools/`.

In: a tool YAML and the model's calls. Out: `ToolResult`s.

`loading.py` reads the YAML into a `Toolset`. `base.py` is the class to subclass, `function.py`
makes a tool of a plain function, in a thread or a process. `schema.py` reads a tool's schema,
`row_kwargs.py` checks the arguments that rows give to tools. `secrets.py` finds the secrets of a
config and hides them, in each of their `spellings.py`, except for `ordinary.py` values.
`session.py` serves one episode: it checks arguments, opens a tool at its first call, retries
infrastructure failures, and closes all tools in every outcome.
"""
