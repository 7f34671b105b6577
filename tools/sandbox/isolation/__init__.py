"""What stands between a program and the machine.

bubblewrap   the command line of a sandbox: mounts, namespaces, the user that programs run as
seccomp      which system calls it may make
cgroup       memory, processes and CPU of its processes together, where the server may set them
diagnosis    what to change on a machine where no sandbox can be made
"""
