"""`python -m mive_core` is the same as `mive`; launchers such as torchrun start it this way."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
