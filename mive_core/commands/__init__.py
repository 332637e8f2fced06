"""What each command does: check its paths, call the library, print where the result is.

The heavy imports stand inside the functions, so that `mive --help` answers at once.
"""
