"""``python -m quictunnel``."""

import sys

from quictunnel.start import main

if __name__ == "__main__":
    sys.exit(main())
