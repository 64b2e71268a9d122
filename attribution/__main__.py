"""The command line: ``python -m attribution COMMAND``."""

from __future__ import annotations

import sys

from attribution.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
