"""Messages to the user of ComfyUI: the library's warnings in the log, and text shown on a node."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy_api.latest import ui

logger = logging.getLogger("MiVE")


@contextmanager
def log_warnings() -> Iterator[list[str]]:
    """Logs each distinct UserWarning of the block once, when the block ends; yields the list that will hold their texts."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield messages
    for warning in caught:
        if str(warning.message) not in messages:
            messages.append(str(warning.message))
            logger.warning("MiVE: %s", warning.message)


def with_text(text: str, image: ui.PreviewImage | None = None) -> dict[str, Any]:
    """Returns the `ui` of a NodeOutput: text, and a picture below it. web/js/node_text.js draws the text."""
    return {**(image.as_dict() if image else {}), **ui.PreviewText(text).as_dict()}


def show_progress(node, text: str, after_cancel: str = "") -> None:
    """Shows text on a running node that has the hidden input `unique_id`, where its final text will be.

    It is gone when the node ends without a text of its own. On Cancel, "cancelled at", the text and `after_cancel` stay.
    """
    if node.hidden.unique_id:
        from server import PromptServer  # present only when a server runs, which has imported it already

        server = PromptServer.instance
        server.send_sync("mive.progress", {"node": node.hidden.unique_id, "text": text, "after_cancel": after_cancel}, server.client_id)
