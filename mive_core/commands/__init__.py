"""The functions behind the commands: each checks its paths, calls the library and prints where the result is.

Slow imports are inside the functions, so that `mive --help` is fast.
"""
