"""Drawn clips and paired edits whose outcome is known exactly, for training and for measuring."""

from .looks import LOOKS_FN, apply_look
from .stage import random_clip

__all__ = ["LOOKS_FN", "apply_look", "random_clip"]
