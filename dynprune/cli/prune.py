"""`dynprune prune`: cuts a model to a share of its channels, a number of multiply-adds or a latency, and prints what that did."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynprune.cli.models import add_model_arguments, load_model

CRITERIA = ("l1", "l2", "bn_scale", "fpgm", "random")
"""Those that need no data."""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the verb `prune`."""
    parser = verbs.add_parser("prune", help="cut a model to a smaller plain one, and print which layers and what it saves")
    add_model_arguments(parser)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--keep", metavar="R", type=float, help="share of the channels to keep")
    goal.add_argument("--macs", metavar="M", type=float, help="multiply-adds to stay within; up to 1 a share of the model's")
    goal.add_argument("--ms", metavar="T", type=float, help="milliseconds of a call to stay within, on this machine")
    parser.add_argument("--criterion", choices=CRITERIA, default="l2", help="what to keep; default l2")
    parser.add_argument("--scope", choices=("global", "local"), default="global", help="rank all layers together, or cut all alike")
    parser.add_argument("--coupled", action="store_true", help="also cut the channels of residual streams")
    parser.add_argument("--branches", action="store_true", help="also take out whole residual branches")
    parser.add_argument("--round-to", metavar="N", type=int, default=1, help="round channels up to a multiple of N; default 1")
    parser.add_argument("--runtime", choices=("engine", "eager"), default="engine", help="what times are measured with; default engine")
    parser.add_argument("--out", metavar="FILE", type=Path, help="save weights and cuts as safetensors, for dynprune.load_pruned")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the report of `prune`; returns 0."""
    loaded = load_model(arguments)

    from dynprune.pruning.recipe import save_pruned
    from dynprune.pruning.structured import prune

    small, report = prune(
        loaded.model,
        loaded.inputs,
        keep_ratio=arguments.keep,
        target_macs=arguments.macs,
        target_ms=arguments.ms,
        criterion=arguments.criterion,
        scope=arguments.scope,
        coupled=arguments.coupled,
        structures=("channels", "neurons", "heads", *(["branches"] if arguments.branches else [])),
        round_to=arguments.round_to,
        runtime=arguments.runtime,
    )
    print(report)
    if arguments.out is not None:
        save_pruned(arguments.out, small, report.recipe)
        print(f"\nsaved to {arguments.out}")
    return 0
