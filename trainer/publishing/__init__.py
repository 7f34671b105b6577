"""Publishing, on the run's side: bring new policy versions from the ranks to the rollout server.

In: a policy version on the ranks. Out: a server that serves it. No torch.

1. `server_process`: the rollout server as a child process, restarted when it dies.
2. `weights_folder`: the folder of published versions, in shared memory or the run directory.
3. `server_link`: the admin connection to the server; repeats an update until it is served.
4. `base`: the transport protocol. `transports`: the table of transports.
5. `disk`, `shared`, `broadcast`: one transport each. The file of the same name in
`trainer.learner.weights` is the ranks' side; the one in the engine receives. `slots`: the two
   folders that shared versions are written to in turn.

To add a transport: a file here, one in `trainer.learner.weights` (with a line in its `publisher`),
one in the engine, a name in `config.PublishConfig.transport` and a line in `transports`.
"""
