"""UserError, the exception for bad input."""


class UserError(ValueError):
    """Bad input. The message is one line: where and what the problem is, what was got and expected, and the fix.

    Command-line programs print it and exit with 2; inside ComfyUI it is the node's error.
    """

    __module__ = "mive_core.errors"  # otherwise hosts that mount the package elsewhere would show their own path

    def __init__(self, what: str, *, where: object = None, got: object = None, expected: object = None, fix: str | None = None):
        parts = [what if where is None else f"{where}: {what}"]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if fix is not None:
            parts.append(fix)
        super().__init__("; ".join(parts).replace("\n", " "))
