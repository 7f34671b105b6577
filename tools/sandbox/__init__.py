"""The code sandbox: a server that runs programs of models, each isolated from everything else.

A request comes in with Sandbox Fusion's fields; how the program ended goes out. In the order in
which a program meets them:

    settings, commands    `agentloop sandbox serve`, and its options
    serving, app          the process and its HTTP API; `messages` holds the requests and answers
    runner, sessions      from a request to its answer: a program, or a cell of a session
    pool, worker          sandboxes that wait, and one from its start to its end
    isolation/            how a sandbox is made, and where none can be, why
    inside/init.py        its first process
    usage                 what its processes use together
    output, languages     what a program writes; what it may be written in

docs/sandbox.md says what this stops, and what it does not.
"""
