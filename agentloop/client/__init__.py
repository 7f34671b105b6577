"""The client of the rollout server: tokens in; tokens, logprobs and policy versions out.

A prompt comes in as token ids; a `GenerateResult` goes out, checked against the token law. The
files, in the order of a request:

    client        `GenerateClient`: build the request, send it, check the answer; `Generator`: the
                  protocol that episodes depend on
    connections   `ConnectionPool`: an httpx transport for many small requests in flight at once
    open_files    how many connections the limit of open files allows
    retry         `Retries`: how long to wait after a failure or an outage, and when to give up
    time_limit    `TimeLimit`: time limits of calls and episodes, which do not count such waits
"""
