"""A sweep over settings: ``python -m gitlight.sweep SWEEP.yaml [--trials N] [--workers N] [--storage URL]``."""

import sys

from gitlight.sweep.command import sweep_command

if __name__ == "__main__":
    sys.exit(sweep_command(sys.argv[1:]))
