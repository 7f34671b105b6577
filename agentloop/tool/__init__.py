"""What a tool is; the folder `tools/` holds tools. In: a tool YAML and calls of the model. Out:
`ToolResult`s.

`loading.py` reads the YAML into a `Toolset`. `base.py` is the class to subclass, `function.py`
makes a tool of a plain function, in a thread or a process. `session.py` is one episode's use: it
checks arguments, opens a tool at its first call, retries broken machinery, and closes everything in
every outcome.
"""
