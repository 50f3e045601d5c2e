"""`dynprune explain`: prints what runs where, and what cannot be gated and why."""

from __future__ import annotations

import argparse

from dynprune.cli.models import add_model_arguments, load_model


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the verb `explain`."""
    parser = verbs.add_parser("explain", help="print every step of a model's plan, its site and cost, and what cannot be gated")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table of `DynamicModel.explain()`; returns 0."""
    loaded = load_model(arguments)

    from dynprune.runtime.model import DynamicModel

    print(DynamicModel(loaded.model, loaded.inputs).explain())
    return 0
