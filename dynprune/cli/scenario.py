"""`dynprune bench --scenario`: serves a model under a scripted load, under a budget, dense and at a fixed level, and compares."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dynprune.cli.machine import Machine, describe_machine
from dynprune.cli.scenarios import Call, Scenario, make_scenario, serve
from dynprune.cli.table import format_table
from dynprune.cli.trace import Figures, Trace, figures_of
from dynprune.control.pressure import other_cores
from dynprune.timing import percentiles

if TYPE_CHECKING:
    import torch

    from dynprune.runtime.model import DynamicModel

_HEADERS = (
    "variant", "n", "p50 ms", "p95 ms", "p99 ms", "steady misses", "first second", "recovers at", "slack", "in hindsight",
    "mean level", "guarded", "level changes", "accuracy loss",
)  # fmt: skip


_BASE_S = 1.5
"""Seconds of serving at level 0 that a budget is taken from."""


@dataclass(frozen=True)
class Variant:
    """One way to serve: its name, its trace and the figures."""

    name: str
    trace: Trace
    figures: Figures


@dataclass(frozen=True)
class ScenarioReport:
    """One scenario, all variants under the same load one after the other.

    `idle_ms` is the median at level 0 before, and `other_cores` how many cores other programs took then; None where that is not known.
    """

    machine: Machine
    model: str
    scenario: Scenario
    idle_ms: float
    other_cores: float | None
    budget_ms: float
    percentile: float
    variants: tuple[Variant, ...]

    def to_dict(self) -> dict[str, object]:
        """Returns plain data for JSON, traces included."""
        return asdict(self)


def run_scenario(
    dm: DynamicModel,
    name: str,
    inputs: Sequence[tuple[torch.Tensor, ...]],
    *,
    budget_ms: float | None = None,
    budget_factor: float = 1.5,
    percentile: float = 95,
    seconds: float = 10.0,
    gap_s: float = 0.001,
    neighbours: int | None = None,
    rivals: dict[str, Callable[[int], object]] | None = None,
    model_name: str = "model",
) -> ScenarioReport:
    """Returns how a calibrated model kept its budget under a scenario, against dense, a fixed level and rivals.

    Args:
        dm: calibrated, in eval mode.
        name: of the scenario, see `scenarios.NAMES`; not "memory".
        inputs: calls of the model, taken in turn.
        budget_ms: to keep; None for `budget_factor` times the median at level 0 while nobody else runs, measured first at this pace.
        percentile: to keep it in.
        seconds: each variant is served.
        gap_s: pause between calls.
        neighbours: busy processes; default None for one per core.
        rivals: other ways to run the model, by name, called with the number of the inference.
        model_name: for the report.

    Raises:
        NoCgroupError: the scenario needs a control group that cannot be made here.
    """
    from dynprune.control.monitor import ResourceMonitor
    from dynprune.control.sources import allowed_cores

    cores = int(allowed_cores())
    scenario = make_scenario(name, seconds, cores, neighbours=neighbours)
    monitor = ResourceMonitor(_BASE_S / 2)
    monitor.sample()
    idle = serve(_at_level(dm, inputs, 0.0), make_scenario("idle", _BASE_S, cores), _BASE_S, gap_s, cores)
    others = other_cores(monitor.sample())
    base_ms = percentiles(idle.latency_ms, (50,))[0]
    if budget_ms is None:
        budget_ms = budget_factor * base_ms
    half, _ = dm.frontier.level_for(budget_ms / 2 * dm.frontier.latency_ms_at(0.0) / base_ms)
    ways = {
        f"budget {budget_ms:.2f} ms": _budgeted(dm, inputs, budget_ms, percentile),
        "dense (level 0)": _at_level(dm, inputs, 0.0),
        f"fixed level {half:.2f}": _at_level(dm, inputs, half),
        **{rival: _of_rival(dm, run) for rival, run in (rivals or {}).items()},
    }
    variants = []
    for label, way in ways.items():
        trace = serve(way, scenario, seconds, gap_s, cores)
        variants.append(Variant(label, trace, figures_of(trace, budget_ms, percentile, dm.frontier)))
        time.sleep(0.3)
    return ScenarioReport(describe_machine(dm.num_threads), model_name, scenario, base_ms, others, budget_ms, percentile, tuple(variants))


def scenario_text(report: ScenarioReport) -> str:
    """Returns the report as a table under two lines on its conditions."""
    rows = [
        [
            variant.name,
            str(figures.inferences),
            figures.p50_ms,
            figures.p95_ms,
            figures.p99_ms,
            *(_per_cent(share) for share in (figures.steady_misses, figures.first_second_misses)),
            str(figures.recovery),
            *(_per_cent(share) for share in (figures.slack, figures.hindsight_slack)),
            figures.mean_level,
            *(_per_cent(share) for share in (figures.guarded, figures.level_changes)),
            _per_cent(figures.accuracy_loss),
        ]
        for variant in report.variants
        for figures in (variant.figures,)
    ]
    others = "" if report.other_cores is None else f", beside {report.other_cores:.2f} cores of other programs"
    lines = [
        str(report.machine),
        f"{report.model}, scenario {report.scenario.name}: {report.scenario.what}",
        f"p{report.percentile:g} within {report.budget_ms:.2f} ms; idle median at level 0 {report.idle_ms:.2f} ms{others}",
        "",
        format_table(_HEADERS, rows),
    ]
    return "\n".join(lines)


def _budgeted(dm: DynamicModel, inputs: Sequence[tuple], budget_ms: float, percentile: float):
    @contextmanager
    def way():
        from dynprune.control.monitor import ResourceMonitor

        with ResourceMonitor() as monitor, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a budget out of reach: the figures tell
            dm.attach_monitor(monitor)
            dm.set_latency_budget(ms=budget_ms, percentile=percentile)
            try:
                yield _caller(dm, inputs)
            finally:
                dm.set_latency_budget(None)
                dm.attach_monitor(None)

    return way


def _at_level(dm: DynamicModel, inputs: Sequence[tuple], level: float):
    @contextmanager
    def way():
        dm.level = level
        try:
            yield _caller(dm, inputs)
        finally:
            dm.level = 0.0

    return way


def _of_rival(dm: DynamicModel, run: Callable[[int], object]):
    @contextmanager
    def way():
        def call(number: int) -> Call:
            run(number)
            return Call(0.0, 0.0, dm.num_threads)

        yield call

    return way


def _caller(dm: DynamicModel, inputs: Sequence[tuple]) -> Callable[[int], Call]:
    turn = itertools.cycle(inputs)
    dm.reset_stats()

    def call(number: int) -> Call:
        dm(*next(turn))
        level, end_level, threads, _ = dm.last_call
        return Call(level, end_level, threads)

    return call


def _per_cent(share: float) -> str | None:
    return None if math.isnan(share) else f"{share:.1%}"
