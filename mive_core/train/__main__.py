"""python -m mive_core.train RECIPE.yaml"""

import sys

from ..errors import UserError
from .dispatch import train

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m mive_core.train RECIPE.yaml")
    try:
        train(sys.argv[1])
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
