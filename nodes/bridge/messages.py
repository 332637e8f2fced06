"""Messages to the user of ComfyUI: the library's warnings in the log, and text shown on a node."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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


def show(node, text: str) -> None:
    """Shows text on a running node that has the hidden input `unique_id`; ui.PreviewText alone is not shown while a node runs.

    Lines are ended with a semicolon, because the new (Vue) nodes draw all lines as one.
    """
    if node.hidden.unique_id:
        from server import PromptServer  # present only when a server runs, which has imported it already

        PromptServer.instance.send_progress_text(text.replace("\n", ";\n"), node.hidden.unique_id)
