"""What the library warns of, said where a user of ComfyUI sees it: in the log, with the pack's name."""

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
