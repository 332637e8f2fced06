"""The diffusion transformer."""

from .model import MiVEDiT

__all__ = ["MiVEDiT"]
