"""`python -m agentloop.worker`: see `agentloop.worker.process`."""

from agentloop.worker.process import exit_now, main

main()
exit_now()
