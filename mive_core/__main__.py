"""`python -m mive_core` works like `mive`; launchers such as torchrun start it so."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
