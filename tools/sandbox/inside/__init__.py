"""What runs inside a sandbox: one file, without imports of this project, compiled before it is
used.

It is not trusted: the program that it runs belongs to the same user. Its answers are read like
anything that comes from outside.
"""
