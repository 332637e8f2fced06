"""The arguments of the command line: a parser for each group of commands. None of these files imports torch."""
