"""``python -m xmoe``: the command line."""

import sys

from xmoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
