"""What is said to a user of ComfyUI: the library's warnings in the log, with the pack's name; a text on a node's face."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("MiVE")


@contextmanager
def logged() -> Iterator[list[str]]:
    """Logs the library's warnings of the block, once each; yields the list that they are gathered in."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield said
    for warning in caught:
        if str(warning.message) not in said:
            said.append(str(warning.message))
            logger.warning("MiVE: %s", warning.message)


def show(node, text: str) -> None:
    """Writes on the face of a running node, which has the hidden input `unique_id`; ui.PreviewText alone is not drawn there.

    Lines end in a semicolon: the new (Vue) nodes draw them as one.
    """
    if node.hidden.unique_id:
        from server import PromptServer  # only a server draws nodes, and it has imported this itself

        PromptServer.instance.send_progress_text(text.replace("\n", ";\n"), node.hidden.unique_id)
