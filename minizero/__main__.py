"""`python -m minizero VERB` is `minizero VERB`."""

import sys

from minizero.cli import main

if __name__ == "__main__":
    sys.exit(main())
