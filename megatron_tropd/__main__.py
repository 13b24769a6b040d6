"""`python -m megatron_tropd` and `torchrun -m megatron_tropd`: the command line, see cli.py."""

import sys

from megatron_tropd.cli import main

if __name__ == "__main__":
    sys.exit(main())
