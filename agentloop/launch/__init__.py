"""Launchers: where the processes of a run are started, and how they reach the main process.

    base        `Program`, `Launched`, `Launcher`: what starts ranks, agent workers and server
    local       `LocalLauncher`: child processes of this one, each at one end of a socket pair
    listener    `Listener`, in the main process: where processes of other parents connect
    handshake   the first bytes of such a connection: both ends prove that they know the key
    joining     the child's side: its connection, and its end when that closes
    fingerprint what Python, packages and code a machine runs the processes with

The launcher of Ray is `trainer.cluster`.
"""
