"""`python -m mive_core` is the same as `mive`; launchers such as torchrun start it this way."""

import os
import sys

from .cli import main


def run() -> int:
    """Returns the exit code of the command, that of SystemExit included."""
    try:
        return main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(main())
    code = run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a normal exit of connected processes can abort: threads that exchange tensors have been seen to crash the shutdown
