"""MiVE: multiscale vision-language features for reference-guided video editing, in plain PyTorch."""

__version__ = "0.2.0"
