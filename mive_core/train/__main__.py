"""python -m mive_core.train RECIPE.yaml"""

import os
import sys

from ..errors import UserError
from .dispatch import train
from .ranks import num_processes

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m mive_core.train RECIPE.yaml")
    try:
        train(sys.argv[1])
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    if num_processes() > 1:
        # all is written; threads that exchanged tensors have been seen to abort an interpreter that was ending
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
