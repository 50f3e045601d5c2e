"""`dynprune bench`: times a model at several shares of its channels against the other ways to run it, all in one run.

With `--scenario` it serves the model under a scripted load and a latency budget instead.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dynprune.cli.machine import Machine, describe_machine
from dynprune.cli.models import LoadedModel, add_model_arguments, load_model, positive_float, positive_int
from dynprune.cli.rivals import NAMES, Rival, built_rivals, parse_names
from dynprune.cli.scenario_verb import add_scenario_arguments, run_scenarios
from dynprune.cli.table import format_table
from dynprune.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dynprune.graph.sites import Site
    from dynprune.runtime.model import DynamicModel
    from dynprune.timing import Measurement

DEFAULT_KEEPS = (1.0, 0.75, 0.5, 0.25)
_HEADERS = ("keep", "skip rate", "FLOPs ratio", "median ms", "IQR ms", "speed-up", "realised")
TOLERANCE = 1e-3
"""The largest difference from the reference, relative to its largest value, that counts as the same output."""
BF16_TOLERANCE = 5e-2
"""The same for a model that runs in bfloat16."""


@dataclass(frozen=True)
class KeepRow:
    """The engine at one keep ratio.

    Attributes:
        keep: share of the groups of every channels site that ran; branches ran whole.
        skip_rate: share of the model's multiply-adds that did not run.
        flops_ratio: multiply-adds of the whole model / those that ran.
        median_ms, iqr_ms, noisy: of the engine's time per call.
        speedup: the engine's own median at keep 1 / this one; None where keep 1 was not measured.
        realised_ratio: speedup / flops_ratio; 1 is the ideal.
        against: rival to its median / this one: above 1, the engine is faster.
        error: largest difference from the hooked PyTorch model with the same lists, relative to its largest output.
    """

    keep: float
    skip_rate: float
    flops_ratio: float
    median_ms: float
    iqr_ms: float
    noisy: bool
    speedup: float | None
    realised_ratio: float | None
    against: dict[str, float]
    error: float


@dataclass(frozen=True)
class RivalRow:
    """A rival running the whole model; `median_ms`, `iqr_ms` and `error` (against eager) are None where it is not available."""

    name: str
    median_ms: float | None
    iqr_ms: float | None
    noisy: bool
    error: float | None
    reason: str


@dataclass(frozen=True)
class Report:
    """One run of the benchmark."""

    machine: Machine
    model: str
    input_shapes: tuple[tuple[int, ...], ...]
    dtype: str
    keeps: tuple[KeepRow, ...]
    rivals: tuple[RivalRow, ...]

    @property
    def tolerance(self) -> float:
        """The largest error that counts as the same output."""
        return BF16_TOLERANCE if self.dtype == "bfloat16" else TOLERANCE

    def to_dict(self) -> dict[str, object]:
        """Returns plain data for JSON."""
        return asdict(self)

    def agrees(self) -> bool:
        """Returns whether every output measured was the reference's within the tolerance."""
        errors = [row.error for row in self.keeps] + [row.error for row in self.rivals if row.error is not None]
        return all(error <= self.tolerance for error in errors)


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the verb `bench`."""
    parser = verbs.add_parser("bench", help="time a model at several keep ratios against PyTorch, ONNX Runtime and OpenVINO")
    add_model_arguments(parser)
    parser.add_argument("--keep", metavar="R,R,...", type=parse_keeps, default=DEFAULT_KEEPS, help="ratios; default 1,0.75,0.5,0.25")
    parser.add_argument(
        "--against", metavar="NAME,...", default=",".join(NAMES), help=f"rivals, of {','.join(NAMES)}, or none; default all"
    )
    parser.add_argument("--threads", metavar="N", type=positive_int, help="for the engine and every rival; default: torch's number here")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the engine's products, and of OpenVINO's; default float32"
    )
    parser.add_argument("--seconds", metavar="S", type=positive_float, default=3.0, help="timed seconds per row; default 3")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report there")
    add_scenario_arguments(parser)
    parser.set_defaults(run=run)


def parse_keeps(text: str) -> tuple[float, ...]:
    """Returns the keep ratios in a comma-separated list, each once, in (0, 1]."""
    keeps = tuple(dict.fromkeys(positive_float(part) for part in text.split(",")))
    above = [keep for keep in keeps if keep > 1]
    if above:
        raise argparse.ArgumentTypeError(f"a keep ratio must lie in (0, 1], got {above[0]:g}")
    return keeps


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; returns 0, or 1 where an output was not the reference's."""
    import torch

    names = parse_names(arguments.against)
    if arguments.json and not arguments.json.parent.is_dir():
        raise InputError(f"--json: folder {str(arguments.json.parent)!r} does not exist.")
    if arguments.scenario:
        return run_scenarios(arguments, names)
    threads = arguments.threads or torch.get_num_threads()
    report = benchmark(load_model(arguments), arguments.keep, names, threads, arguments.seconds, arguments.dtype)
    print(report_text(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    if not report.agrees():
        print(f"dynprune bench: an output differs from the reference by more than {report.tolerance:g}.", file=sys.stderr)
        return 1
    return 0


def benchmark(
    loaded: LoadedModel, keeps: tuple[float, ...], rival_names: tuple[str, ...], threads: int, seconds: float, dtype: str = "float32"
) -> Report:
    """Returns the times of the engine at each keep ratio and of the rivals, measured in turns, outputs checked.

    Below a keep ratio of 1, which is an ordinary call at level 0, the lists of active groups are given: random, fixed per keep ratio and
    sample, so no gate is evaluated; gates are timed by `demo`.

    Args:
        loaded: model and one batch.
        keeps: keep ratios in (0, 1].
        rival_names: of `rivals.NAMES`.
        threads: for the engine and each rival.
        seconds: timed seconds per row.
        dtype: "float32" or "bfloat16", of the engine and of the rivals that can.
    """
    import torch

    from dynprune.runtime.model import DynamicModel
    from dynprune.timing import measure_interleaved

    torch.set_num_threads(threads)
    with torch.inference_mode():
        reference = first_tensor(loaded.model(*loaded.inputs))
    dm = DynamicModel(loaded.model, loaded.inputs, dtype=getattr(torch, dtype)).eval()
    dm.set_num_threads(threads)
    precision = "bf16" if dtype == "bfloat16" else "f32"
    with built_rivals(rival_names, loaded.model, loaded.inputs, threads, precision=precision) as rivals, torch.no_grad():
        active = {keep: random_active(dm.sites, keep, loaded.inputs[0].shape[0]) for keep in keeps}
        given = {keep: functools.partial(dm.run_with_active, *loaded.inputs, active=active[keep]) for keep in keeps}
        functions = {f"keep {keep:g}": given[keep] if keep < 1 else functools.partial(dm, *loaded.inputs) for keep in keeps}
        functions |= {rival.name: rival.run for rival in rivals if rival.run}
        times = measure_interleaved(functions, seconds=seconds)
        rival_rows = [_rival_row(rival, times, reference) for rival in rivals]
        keep_rows = [_keep_row(dm, loaded, keep, active[keep], times, rival_rows) for keep in keeps]
    shapes = tuple(tuple(item.shape) for item in loaded.inputs)
    return Report(describe_machine(threads), loaded.name, shapes, dtype, tuple(keep_rows), tuple(rival_rows))


def random_active(sites: tuple[Site, ...], keep: float, batch: int) -> dict[str, list[np.ndarray]]:
    """Returns random ascending lists that keep a share of the groups of every channels site, at least one, for each sample.

    Args:
        sites: of the model; branches are left out and so run whole.
        keep: share in (0, 1].
        batch: number of samples.
    """
    import numpy as np

    generator = np.random.default_rng(0)

    def draw(site: Site) -> np.ndarray:
        return np.sort(generator.permutation(site.num_groups)[: max(1, round(keep * site.num_groups))]).astype(np.int32)

    return {site.name: [draw(site) for _ in range(batch)] for site in sites if site.kind == "channels"}


def first_tensor(output: object) -> torch.Tensor:
    """Returns the first tensor or array in an output, which the rivals are compared on.

    Raises:
        InputError: the output holds no tensor.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    for leaf in tree_leaves(output):
        if hasattr(leaf, "__array__"):
            return torch.as_tensor(leaf)
    raise InputError(f"the model's output must hold a tensor to be compared, got {type(output).__name__}.")


def relative_error(output: object, reference: object) -> float:
    """Returns the largest difference between two outputs relative to the reference's largest; inf where sizes differ or one is NaN."""
    ours, theirs = first_tensor(output).double(), first_tensor(reference).double()
    if ours.shape != theirs.shape:
        return math.inf
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
    return error if math.isfinite(error) else math.inf


def _rival_row(rival: Rival, times: dict[str, Measurement], reference: torch.Tensor) -> RivalRow:
    if rival.run is None:
        return RivalRow(rival.name, None, None, False, None, rival.reason)
    taken = times[rival.name]
    return RivalRow(rival.name, taken.median_ms, taken.iqr_ms, taken.noisy, relative_error(rival.run(), reference), "")


def _keep_row(
    dm: DynamicModel,
    loaded: LoadedModel,
    keep: float,
    active: dict[str, list[np.ndarray]],
    times: dict[str, Measurement],
    rivals: list[RivalRow],
) -> KeepRow:
    dm.reset_stats()
    output = dm.run_with_active(*loaded.inputs, active=active)
    skip_rate = dm.stats().skip_rate
    hooked = dm.run_with_active(*loaded.inputs, active=active, backend="hooked")
    taken = times[f"keep {keep:g}"]
    row = KeepRow(
        keep=keep,
        skip_rate=skip_rate,
        flops_ratio=1 / (1 - skip_rate),
        median_ms=taken.median_ms,
        iqr_ms=taken.iqr_ms,
        noisy=taken.noisy,
        speedup=None,
        realised_ratio=None,
        against={rival.name: rival.median_ms / taken.median_ms for rival in rivals if rival.median_ms is not None},
        error=relative_error(output, hooked),
    )
    if "keep 1" not in times:
        return row
    speedup = times["keep 1"].median_ms / taken.median_ms
    return replace(row, speedup=speedup, realised_ratio=speedup / row.flops_ratio)


def report_text(report: Report) -> str:
    """Returns the report as two tables under a line on the machine."""
    available = [rival.name for rival in report.rivals if rival.median_ms is not None]
    engine = format_table(
        [*_HEADERS, *(f"vs {name}" for name in available), "max error"],
        [
            [
                f"{row.keep:g}",
                f"{row.skip_rate:.1%}",
                row.flops_ratio,
                row.median_ms,
                f"{row.iqr_ms:.2f}{'!' if row.noisy else ''}",
                row.speedup,
                row.realised_ratio,
                *(row.against[name] for name in available),
                f"{row.error:.1e}",
            ]
            for row in report.keeps
        ],
    )
    shapes = ", ".join(str(shape) for shape in report.input_shapes)
    lines = [
        str(report.machine),
        f"{report.model} in {report.dtype}, inputs {shapes}; engine and rivals interleaved in one run",
        "",
        engine,
    ]
    if report.rivals:
        rows = [
            [row.name, row.median_ms, f"{row.iqr_ms:.2f}{'!' if row.noisy else ''}", f"{row.error:.1e}"]
            if row.median_ms is not None
            else [row.name, None, None, row.reason]
            for row in report.rivals
        ]
        lines += ["", format_table(["rival, whole model", "median ms", "IQR ms", "max error"], rows)]
    if any(row.noisy for row in (*report.keeps, *report.rivals)):
        lines += ["", "! IQR above a tenth of the median: the machine was busy, measure again."]
    return "\n".join(lines)
