"""Train a generator or a leaked model: ``python train.py [CONFIG.yaml] [key.path=value ...]``."""

import sys
from pathlib import Path

from gitlight.cli import train_command

if __name__ == "__main__":
    sys.exit(train_command(sys.argv[1:], default_config=Path(__file__).parent / "configs" / "demo.yaml"))
