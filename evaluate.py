"""Attack private images with a trained generator: ``python evaluate.py RUN_DIR|CONFIG.yaml [key.path=value ...]``."""

import sys

from gitlight.cli import evaluate_command

if __name__ == "__main__":
    sys.exit(evaluate_command(sys.argv[1:]))
