"""Measures what the steps of a plan and the levels of a model cost on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dynprune.control.host import cpu_name
from dynprune.control.sources import allowed_cores
from dynprune.graph.sites import Site
from dynprune.runtime.costs import CostTable, plan_signature
from dynprune.runtime.engine import Engine
from dynprune.runtime.plan import Plan, Step
from dynprune.timing import measure, measure_interleaved

RUNS = 12
"""Profiled runs per keep ratio."""
LEAST_SCALED = 0.1
"""A gated step's time follows its rows at least to this share, however noisy the two measurements were."""
_REWEIGHTINGS = 20
_EXACT = 1e-3
"""Relative residuals below this count alike."""
_ROUNDS = 6
"""Levels and threads take so many turns, so that a spell of other programs falls on all of them."""
LEAST_FACTOR = 0.2
"""Measured latencies never scale a part of the table by less than this: they may be noisy."""


def measure_costs(engine: Engine, inputs: Sequence[Tensor], sites: Mapping[str, Site]) -> CostTable:
    """Returns the cost table of the engine's plan, without `level_ms`: two-point fits from whole runs and runs at half the channels.

    The lower quartile of the runs counts, as other programs only ever add time. What a run takes beyond its steps counts to PyTorch's
    steps, which the engine does not time, or to the first step.

    Args:
        engine: at the threads to be served with.
        inputs: one sample, flattened.
        sites: by name; at least those of the plan.
    """
    plan = engine.plan
    batch = inputs[0].shape[plan.inputs[0].batch_dim]
    generator = torch.Generator().manual_seed(0)
    groups = {site.name: sites[site.name].num_groups for site in plan.sites if site.kind == "channels"}

    def half(count: int) -> list[list[int]]:
        return [torch.randperm(count, generator=generator)[: max(1, count // 2)].sort().values.tolist() for _ in range(batch)]

    whole, halved, total = [], [], []
    for _ in range(RUNS + 1):  # the first warms up
        whole.append(engine.step_times_ms(inputs))
        halved.append(engine.step_times_ms(inputs, active={name: half(count) for name, count in groups.items()}))
        total.append(measure(lambda: engine.run(inputs), min_seconds=0.0, min_runs=1, warmup=0).median_ms)
    whole_ms, half_ms, total_ms = (np.percentile(times[1:], 25, 0) / batch for times in (whole, halved, total))
    rest_ms = max(0.0, total_ms - whole_ms.sum())
    shares = np.array([0.5 ** len(channel_sites(plan, step)) for step in plan.steps])
    gated = shares < 1
    saved_ms = (whole_ms - half_ms) / np.where(gated, 1 - shares, 1.0)
    scaled_ms = np.where(gated, np.clip(saved_ms, LEAST_SCALED * whole_ms, whole_ms), 0.0)
    fixed_ms = whole_ms - scaled_ms
    unseen = np.array([step.torch_call is not None for step in plan.steps])
    if not unseen.any():
        unseen[0] = True
    fixed_ms[unseen] += rest_ms / unseen.sum()
    return CostTable(tuple(fixed_ms.tolist()), tuple(scaled_ms.tolist()), np.zeros((0, len(plan.steps))), plan_signature(plan))


def fit_to_latencies(
    plan: Plan, table: CostTable, shares: Sequence[Mapping[str, Tensor]], latencies_ms: Sequence[float]
) -> tuple[CostTable, list[float]]:
    """Returns the table scaled to measured latencies, with its `level_ms`, and the share of multiply-adds skipped at each level.

    Args:
        plan, table: of the same steps.
        shares: by level: site name to the share of groups that ran, per sample (N,); a site not named ran whole.
        latencies_ms: by level, for one sample.
    """
    run_share, work_share = (np.stack(part) for part in zip(*(_step_shares(plan, level) for level in shares), strict=True))
    sites = [site.name for site in plan.sites]
    site_share = np.array([[float(level[name].double().mean()) if name in level else 1.0 for name in sites] for level in shares])
    table = replace(table, level_ms=np.zeros_like(run_share), run_share=run_share, work_share=work_share, site_share=site_share)
    macs = np.array([step.macs for step in plan.steps], float)
    return scaled_to(table, latencies_ms), (1 - work_share @ macs / max(1.0, macs.sum())).tolist()


def scaled_to(table: CostTable, latencies_ms: Sequence[float]) -> CostTable:
    """Returns the table, whose shares are known, scaled to the latencies measured at its levels.

    All fixed times are multiplied by one factor and all scaled times by another, by least absolute deviations over the levels (one level
    measured during a spell of other programs moves nothing), as a profiled step has caches and threads to itself in another way than a
    step in a run.
    """
    fixed, scaled = np.array(table.fixed_ms), np.array(table.scaled_ms)
    parts = np.stack([table.run_share @ fixed, table.work_share @ scaled], 1)
    fixed, scaled = (times * factor for times, factor in zip((fixed, scaled), _bounded_fit(parts, np.asarray(latencies_ms)), strict=True))
    level_ms = table.run_share * fixed + table.work_share * scaled
    return replace(table, fixed_ms=tuple(fixed.tolist()), scaled_ms=tuple(scaled.tolist()), level_ms=level_ms)


def level_latencies(
    runs: Sequence[Callable[[int], object]], num_threads: int, seconds: float
) -> tuple[list[float], tuple[tuple[int, tuple[float, ...]], ...]]:
    """Returns the median milliseconds of each level's run at `num_threads`, and the same for fewer threads (1, 2, 4, ...).

    Args:
        runs: by level, what to time, called with the number of threads.
        num_threads: most threads.
        seconds: timed for each level and number of threads.
    """
    counts = [num_threads, *(1 << i for i in range(num_threads.bit_length()) if 1 << i < num_threads)]
    functions = {f"{i} {count}": partial(run, count) for i, run in enumerate(runs) for count in counts}
    measured = measure_interleaved(functions, seconds=seconds, block_seconds=seconds / _ROUNDS, pause_seconds=0.0)
    times = {count: _without_outliers([measured[f"{i} {count}"].median_ms for i in range(len(runs))]) for count in counts}
    return times[num_threads], tuple((count, tuple(times[count])) for count in counts[1:])


def _without_outliers(times_ms: list[float]) -> list[float]:
    """Returns the times, each that lies above both its neighbours lowered to the larger of these: times do not rise with the level."""
    inner = [min(ms, max(before, after)) for before, ms, after in zip(times_ms, times_ms[1:], times_ms[2:], strict=False)]
    return [times_ms[0], *inner, *times_ms[1:][-1:]]


def machine_name(isa: str) -> str:
    """Returns the words that a frontier's times hold for: processor, instruction set, cores that may be used."""
    return f"{cpu_name()}, {isa}, {allowed_cores():g} cores"


def _bounded_fit(parts: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Returns the two factors, each at least `LEAST_FACTOR`, whose mix of the two columns is nearest to `measured`.

    Least absolute relative deviations, by least squares with weights from the last residuals.
    """
    weights = 1 / np.maximum(measured, 1e-30)
    for _ in range(_REWEIGHTINGS):
        factors = np.linalg.lstsq(parts * weights[:, None], measured * weights, rcond=None)[0]
        relative = np.abs(parts @ factors / np.maximum(measured, 1e-30) - 1)
        weights = 1 / np.maximum(measured, 1e-30) / np.sqrt(np.maximum(relative, _EXACT))
    low = int(factors.argmin())
    if factors[low] < LEAST_FACTOR:
        other = parts[:, 1 - low] * weights
        factors[low] = LEAST_FACTOR
        factors[1 - low] = other @ ((measured - LEAST_FACTOR * parts[:, low]) * weights) / max(1e-30, other @ other)
    return factors.clip(LEAST_FACTOR)


def _step_shares(plan: Plan, shares: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Returns, by step, the share of the samples that ran it, and the mean share of its rows x columns that ran."""
    run, work = np.zeros(len(plan.steps)), np.zeros(len(plan.steps))
    for i, step in enumerate(plan.steps):
        inner, outer = (_product(shares, names) for names in (channel_sites(plan, step), [plan.sites[b].name for b in step.branches]))
        run[i], work[i] = np.mean(outer), np.mean(inner * outer)
    return run, work


def channel_sites(plan: Plan, step: Step) -> list[str]:
    """Returns the names of the channel sites that a step's rows follow."""
    return [plan.sites[i].name for i in sorted({step.in_site, step.out_site} - {-1})]


def _product(shares: Mapping[str, Tensor], names: Sequence[str]) -> np.ndarray | float:
    result: np.ndarray | float = 1.0
    for name in names:
        if name in shares:
            result = result * shares[name].double().numpy()
    return result
