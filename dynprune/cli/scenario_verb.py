"""The options of `dynprune bench` for scenarios, and what they run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dynprune.cli.models import LoadedModel, load_model, positive_float
from dynprune.cli.own_cgroup import NoCgroupError
from dynprune.cli.scenarios import NAMES
from dynprune.errors import InputError

if TYPE_CHECKING:
    from dynprune.runtime.model import DynamicModel

CALIBRATION_SAMPLES = 64
_BATCH = 16
_INPUTS = 8


def add_scenario_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --scenario and what belongs to it."""
    group = parser.add_argument_group("with --scenario, the model is served under a load that comes and goes")
    group.add_argument("--scenario", choices=NAMES, help="the load; every other option below counts with it only")
    group.add_argument("--budget-ms", metavar="MS", type=positive_float, help="to keep; default by --budget-factor")
    group.add_argument("--budget-factor", metavar="F", type=positive_float, default=1.5, help="times the idle median; default 1.5")
    group.add_argument("--gap-ms", metavar="MS", type=positive_float, default=1.0, help="pause between calls; default 1")
    group.add_argument("--percentile", metavar="P", type=float, default=95.0, help="share of calls that should keep it; default 95")
    group.add_argument("--duration", metavar="S", type=positive_float, default=10.0, help="seconds each variant is served; default 10")
    group.add_argument("--checkpoint", metavar="FILE", type=Path, help="of dm.save(); default: calibrated now on random inputs")
    group.add_argument("--plot", metavar="FILE", type=Path, help="write latency and level over time there (needs matplotlib)")


def run_scenarios(arguments: argparse.Namespace, rival_names: tuple[str, ...]) -> int:
    """Prints the report of the scenario; returns 0, or 1 where this machine does not permit it (and says why)."""
    import torch

    from dynprune.cli.memory_scenario import memory_text, run_memory
    from dynprune.cli.rivals import built_rivals
    from dynprune.cli.scenario import run_scenario, scenario_text

    if arguments.plot and not arguments.plot.parent.is_dir():
        raise InputError(f"--plot: folder {str(arguments.plot.parent)!r} does not exist.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments)
    dm, inputs = _calibrated(loaded, arguments.checkpoint)
    with built_rivals(rival_names, loaded.model, loaded.inputs, dm.num_threads) as built, torch.no_grad():
        rivals = {rival.name: _ignoring_number(rival.run) for rival in built if rival.run is not None}
        try:
            if arguments.scenario == "memory":
                report = run_memory(dm, inputs, model_name=loaded.name)
                print(memory_text(report))
            else:
                report = run_scenario(
                    dm,
                    arguments.scenario,
                    inputs,
                    budget_ms=arguments.budget_ms,
                    budget_factor=arguments.budget_factor,
                    gap_s=arguments.gap_ms / 1e3,
                    percentile=arguments.percentile,
                    seconds=arguments.duration,
                    rivals=rivals,
                    model_name=loaded.name,
                )
                print(scenario_text(report))
        except NoCgroupError as error:
            print(f"dynprune bench: scenario {arguments.scenario!r} cannot run here: {error}.", file=sys.stderr)
            return 1
    if arguments.plot and arguments.scenario != "memory":
        from dynprune.cli.scenario_plot import plot

        plot(report, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return 0


def _calibrated(loaded: LoadedModel, checkpoint: Path | None) -> tuple[DynamicModel, list[tuple]]:
    """Returns the model with its gates, and the inputs to serve it with."""
    import torch

    from dynprune.runtime.model import DynamicModel
    from dynprune.training.calibrate import calibrate

    generator = torch.Generator().manual_seed(1)
    inputs = [_like(loaded.inputs, generator) for _ in range(_INPUTS)]
    if checkpoint is not None:
        dm = DynamicModel.load(checkpoint, loaded.model)
        if dm.frontier is None:
            raise InputError(f"--checkpoint: {str(checkpoint)!r} holds no calibration; call calibrate(dm, data) before dm.save().")
        return dm.eval(), inputs
    dm = DynamicModel(loaded.model, loaded.inputs).eval()
    batches = -(-CALIBRATION_SAMPLES // _BATCH)
    samples = [tuple(x[:1].repeat(_BATCH, *[1] * (x.dim() - 1)) for x in loaded.inputs) for _ in range(batches)]
    calibrate(dm, [_like(sample, generator) for sample in samples], progress=True)
    return dm, inputs


def _like(inputs: tuple, generator) -> tuple:
    """Returns standard normal tensors in place of those of floating point; others stay."""
    import torch

    return tuple(torch.randn(x.shape, generator=generator) if x.is_floating_point() else x for x in inputs)


def _ignoring_number(run):
    return lambda number: run()
