"""A challenge set: pairs for evaluation alone, by a generator that shares no code and no sentence with the training's (`../synthetic`).

Outlines are polygons drawn by Pillow, backgrounds are filtered noise or footage, and looks, motion and phrasing are other ones. Only the
names of shapes and colours are the same, since the embedded VLM knows no others.
"""

from .pairs import EDITS, KINDS, ChallengePairs

__all__ = ["EDITS", "KINDS", "ChallengePairs"]
