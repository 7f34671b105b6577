"""`code_interpreter`: the model writes a program, and reads what it prints.

In the order in which a call meets them:

    source        the program within the argument: its fence is removed, a last expression printed
    tool          `CodeInterpreter`: the request to a sandbox, its answer, a session an episode
    leases        `Leases`: a session lives as long as its episode, and ends soon after a killed run
    shown         what the model reads: output cut at its middle, errors, limits, figures

The sandbox is this project's (`agentloop sandbox serve`) or a Sandbox Fusion server.

    tools:
      - class_name: tools.code.CodeInterpreter
        config: {sandbox_url: http://127.0.0.1:8080}
"""

from tools.code.tool import CodeInterpreter

__all__ = ["CodeInterpreter"]
