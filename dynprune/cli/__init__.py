"""The `dynprune` command: the parser, and how a user's mistake is told. Each verb is a file here with add_parser() and run()."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from dynprune.errors import DynpruneError

VERBS = ("demo", "bench", "explain", "prune", "doctor")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command; importing the verbs does not import torch."""
    parser = argparse.ArgumentParser(prog="dynprune", description="Dynamic inference for PyTorch models on CPUs.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    for verb in VERBS:
        importlib.import_module(f"dynprune.cli.{verb}").add_parser(verbs)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 for success, 1 for a failed check, 2 for a mistake in the call, 130 for Ctrl-C.

    Args:
        argv: the words after `dynprune`; default None takes those of the process.
    """
    arguments = build_parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except DynpruneError as error:
        print(f"dynprune {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `dynprune explain ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
