"""The progress of a long-running node, shown as a bar and as text."""

import time

import comfy.model_management
import comfy.utils

from .messages import show_progress

MIN_INTERVAL = 0.5  # seconds between two texts


class Progress:
    """Progress through the items of one phase. Each step checks whether the user pressed Cancel; then `after_cancel` ends the text."""

    def __init__(self, node, what: str, total: int, done: int = 0, after_cancel: str = ""):
        self.node, self.what, self.total, self.done, self.after_cancel, self.shown_at = node, what, total, done, after_cancel, 0.0
        self.bar = comfy.utils.ProgressBar(total)

    def advance(self, remark: str = "") -> None:
        """Advances to the next item. Raises ComfyUI's InterruptProcessingException if Cancel was pressed."""
        self.done = min(self.done + 1, self.total)
        self.bar.update_absolute(self.done)
        if time.monotonic() - self.shown_at > MIN_INTERVAL or self.done == self.total or comfy.model_management.processing_interrupted():
            show_progress(self.node, f"{self.what} {self.done} of {self.total}{remark}", self.after_cancel)
            self.shown_at = time.monotonic()
        comfy.model_management.throw_exception_if_processing_interrupted()
