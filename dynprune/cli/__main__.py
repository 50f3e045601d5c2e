"""Lets `python -m dynprune.cli` do what the `dynprune` command does."""

import sys

from dynprune.cli import main

sys.exit(main())
