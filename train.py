"""Train a draft head: `accelerate launch train.py --config configs/NAME.yaml [key=value ...]`.

The same as `headstart train`.
"""

import sys

from headstart.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
