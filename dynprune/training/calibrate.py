"""`calibrate`: fits every gate without gradients, measures this machine, and draws the frontier of time and accuracy."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprune.control.frontier import Frontier, OperatingPoint
from dynprune.errors import CalibrationError, InputError
from dynprune.graph.sites import Site
from dynprune.runtime.costs import CostTable
from dynprune.runtime.engine import Engine
from dynprune.runtime.model import DynamicModel
from dynprune.runtime.plan import Plan
from dynprune.runtime.profile import fit_to_latencies, level_latencies, machine_name, measure_costs
from dynprune.training.allocation import Sensitivity, allocate
from dynprune.training.costing import allocation_costs
from dynprune.training.outputs import agreement
from dynprune.training.progress import Report, reporter
from dynprune.training.samples import Chunk, nth_sample, read_samples, split, take
from dynprune.training.scores import fit_channels, record_channels, record_pooled
from dynprune.training.sensitivity import (
    KEEP_RATIOS,
    Metric,
    apply_fit,
    branch_errors,
    channel_errors,
    fit_branch,
    joint_agreement,
    joint_thresholds,
)
from dynprune.training.tokens import set_token_curves

SENSITIVITY_MACS = 8e11
"""Multiply-adds for gating each site alone, some 15 s of two idle cores; with the next two it decides how many samples are used."""
THRESHOLD_MACS = 2e11
ACCURACY_MACS = 4e11
"""The same for setting, and for measuring, all levels with all sites gated."""
BRANCH_CAUTION = 10.0
"""Factor on the measured errors of skipped branches. One score is fitted to few samples for a whole branch, so the ones that look harmless
there look so by luck; on ResNet-56 branches cost some four times more accuracy per multiply-add than channels."""
LEAST_AGREEMENT = 0.5
"""Level 1 is the tightest at which this share of the answers stays that of level 0: what lies beyond is of no use to anybody."""
LATENCY_SECONDS = 0.1
"""Timed seconds per level."""
LEAST_SAMPLES = 32
STATIC = "no gate depends on the input; dm.freeze(level) runs the same without gates"


def calibrate(
    dm: DynamicModel,
    inputs: Iterable[Any],
    *,
    levels: int = 32,
    metric: Metric | None = None,
    progress: bool | Callable[[float, str], None] = False,
) -> Frontier:
    """Returns the `Frontier` of `dm` on this machine: expected time and accuracy at each level.

    Fits every gate to the inputs without gradients, then times the engine. The weights of the user's model are not touched; at level 0
    the outputs stay those of the original model. Every fourth sample is kept out of the fit and used to measure what skipping costs.
    On an error the gates stay as they were. Run it on an otherwise idle machine.

    Args:
        dm: the DynamicModel to calibrate, in place, on CPU.
        inputs: iterable of batches as the model takes them: a tensor, a tuple of arguments, a dict of keyword arguments, or a pair of
            one of these and labels; a few hundred samples are enough, at most 1024 are read.
        levels: number of operating points, >= 2, default 32.
        metric: callable (output of a batch, its labels) -> float, higher is better, averaged over batches by their size; every batch
            must then have labels. Default None compares with the outputs at level 0: the share of samples with the same class.
        progress: True writes a line to stderr, a callable gets (share done in [0, 1], what is done now); default False.

    Raises:
        CalibrationError: `inputs` is empty, holds NaN or Inf, or lacks labels; the message names the batch.
        InputError: `levels` is below 2, or the model is not on CPU.

    Example:
        >>> frontier = calibrate(dm, [torch.rand(8, 3, 224, 224) for _ in range(32)])
    """
    check_levels(levels)
    if any(p.device.type != "cpu" for p in dm.model.parameters()):
        raise InputError("calibrate measures the engine, which runs on CPU; call dm.to('cpu') first.")
    captured = dm.attachment is not None
    chunks = read_samples(
        inputs,
        labelled=metric is not None,
        num_inputs=len(dm.graph.inputs) if captured else None,
        splittable=not captured or dm.graph.dynamic_batch,
    )
    report = reporter(progress, "calibrate")
    with eval_mode(dm), torch.no_grad():
        plan = dm.engine_for(*chunks[0].args, **chunks[0].kwargs).plan
        if not plan.sites:
            raise CalibrationError("The model has no place that can be gated, so there is nothing to calibrate; dm.explain() says why.")
        backup = copy.deepcopy(dm.gates.state_dict())
        try:
            calibration = Calibration(dm, plan, chunks, levels, metric, report)
            frontier, costs = calibration.run()
        except BaseException:
            dm.gates.load_state_dict(backup)
            dm.refresh()
            raise
    dm.set_frontier(frontier, costs)
    report(1.0, "calibrated" if calibration.input_dependent else f"calibrated; {STATIC}")
    return frontier


def measure_frontier(dm: DynamicModel, chunks: list[Chunk], *, levels: int, metric: Metric | None, report: Report) -> bool:
    """Gives `dm` the frontier of the gates as they are, and returns whether some gate depends on the input at level 1.

    Args:
        dm: on CPU.
        chunks: samples; every fourth chunk is measured on.
        levels, metric: as for `calibrate`.
        report: called with the progress.
    """
    with eval_mode(dm), torch.no_grad():
        plan = dm.engine_for(*chunks[0].args, **chunks[0].kwargs).plan
        calibration = Calibration(dm, plan, chunks, levels, metric, report)
        dm.set_frontier(*calibration.measure())
    return calibration.input_dependent


def check_levels(levels: int) -> None:
    """Raises InputError where `levels` is not a number of operating points."""
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise InputError(f"`levels` must be an int >= 2, got {levels!r}.")


class Calibration:
    """One calibration: `run` goes through its stages.

    Attributes:
        input_dependent: whether some gate made different choices for different inputs at level 1; known once the frontier is.
    """

    def __init__(self, dm: DynamicModel, plan: Plan, chunks: list[Chunk], levels: int, metric: Metric | None, report: Report):
        self.dm = dm
        self.plan = plan
        self.levels = levels
        self.metric = metric
        self.report = report
        self.attachment = dm.attachment
        self.sites: dict[str, Site] = {site.name: site for site in dm.sites}
        self.gated = [self.sites[site.name] for site in plan.sites]
        self.splittable = plan.fixed_batch is None
        self.input_dependent = True
        self.fitted, self.held_out = split(chunks, splittable=self.splittable)

    def run(self) -> tuple[Frontier, CostTable]:
        """Returns the frontier and the cost table; the gates are fitted."""
        self.report(0.0, "timing the whole model")
        table = measure_costs(self._engine(), self._single(0), self.sites)
        sensitivities = self.fit_gates()
        keeps = allocate(allocation_costs(self.plan, table), sensitivities, self.levels, self._usefulness())
        self.set_curves(keeps)
        return self.frontier(table)

    def measure(self) -> tuple[Frontier, CostTable]:
        """Returns the frontier and the cost table of the gates as they are."""
        self.report(0.0, "timing the whole model")
        return self.frontier(measure_costs(self._engine(), self._single(0), self.sites))

    def fit_gates(self) -> dict[str, Sensitivity]:
        """Fits the gate of every site that the plan gates, and returns how much the output suffers when that site alone is gated."""
        records = record_channels(self.attachment, self.fitted)
        runs = sum(len(KEEP_RATIOS) if site.kind == "channels" else 2 for site in self.gated)
        held_out, fitted = (self._affordable(chunks, SENSITIVITY_MACS, runs) for chunks in (self.held_out, self.fitted))
        references = [self._whole(chunk) for chunk in held_out]
        fit_references = [self._whole(chunk) for chunk in fitted]
        pooled, fit_pooled = record_pooled(self.attachment, held_out), record_pooled(self.attachment, fitted)
        sensitivities = {}
        for number, site in enumerate(self.gated):
            self.report(0.05 + 0.5 * number / len(self.gated), f"fitting {site.name}")
            if site.kind == "channels":
                record, rank = records[site.name], self.attachment.gate(site.name).down.shape[0]
                apply_fit(self.attachment.gate(site.name), fit_channels(site, record, rank, compensate=True))
                errors = channel_errors(self.attachment, site, torch.cat(record.pooled), held_out, references)
            else:
                fit_branch(self.attachment, site, fit_pooled[site.name], fitted, fit_references)
                errors = branch_errors(self.attachment, site, pooled[site.name], held_out, references)
                errors = {keep: BRANCH_CAUTION * error for keep, error in errors.items()}
            sensitivities[site.name] = Sensitivity(errors)
        return sensitivities

    def set_curves(self, keeps: list[dict[str, float]]) -> None:
        """Sets every gate's thresholds so that each level keeps its ratios when all sites are gated at that level."""
        pooled = record_pooled(self.attachment, self.fitted)
        curves: dict[str, list[Tensor]] = {}
        for name in self.sites:
            scores = self.attachment.gate(name).score(pooled[name])
            all_run = scores.min() - scores.std(correction=0) - 1e-3
            curves[name] = [all_run] * self.levels
        chunks = self._affordable(self.fitted, THRESHOLD_MACS, self.levels)
        for level in range(1, self.levels):
            self.report(0.55 + 0.15 * level / self.levels, f"setting level {level} of {self.levels - 1}")
            for name, threshold in joint_thresholds(self.attachment, chunks, keeps[level]).items():
                curves[name][level] = threshold
        for name, curve in curves.items():
            gate = self.attachment.gate(name)
            gate.set_curve(torch.stack(curve))
            gate.calibrated.fill_(True)

    def frontier(self, table: CostTable) -> tuple[Frontier, CostTable]:
        """Returns what each level of the gates as they are costs and keeps, and `table` scaled to the measured times."""
        chunks = self._affordable(self.held_out, ACCURACY_MACS, self.levels)
        references = [self._whole(chunk) for chunk in chunks]
        latencies_ms, fewer_threads = self._latencies_ms()
        shares, accuracies = [], []
        kept: dict[str, list[Tensor]] = {site.name: [] for site in self.gated}
        for i in range(self.levels):
            self.report(0.8 + 0.2 * i / self.levels, f"measuring level {i} of {self.levels - 1}")
            results = [self.attachment.run(chunk.args, chunk.kwargs, level=self._level(i)) for chunk in chunks]
            shares.append({name: torch.cat([masks[name].mean(1) for _, masks in results]) for name in results[0][1]})
            for name, frequency in kept.items():
                masks = [masks[name] for _, masks in results if name in masks]
                frequency.append(torch.cat(masks).mean(0) if masks else torch.ones(self.sites[name].num_groups))
            accuracies.append(self._accuracy(chunks, [output for output, _ in results], references))
        for name, frequency in kept.items():
            self.attachment.gate(name).record_frequency(torch.stack(frequency))
        set_token_curves(self.attachment, self.fitted, splittable=self.splittable)
        self.input_dependent = any(bool(((f[-1] > 0) & (f[-1] < 1)).any()) for f in kept.values())
        batch = self.plan.fixed_batch or 1
        costs, skip_rates = fit_to_latencies(self.plan, table, shares, [ms / batch for ms in latencies_ms])
        points = [
            OperatingPoint(
                self._level(i), costs.level_ms[i].sum() * batch, latencies_ms[i], min(1.0, max(0.0, skip_rates[i])), accuracies[i]
            )
            for i in range(self.levels)
        ]
        return Frontier(tuple(points), machine_name(self._engine().isa), self.dm.num_threads, fewer_threads), costs

    def _latencies_ms(self) -> tuple[list[float], tuple[tuple[int, tuple[float, ...]], ...]]:
        """Returns the engine's median latency at each level, over a few of the samples in turn, and the same for fewer threads."""
        self.report(0.7, "timing the levels")
        engine = self._engine()
        samples = [self._single(i) for i in range(min(8, sum(chunk.size for chunk in self.held_out)))]

        def run_at(level: float) -> Callable[[int], Any]:
            turn = itertools.cycle(samples)
            return lambda threads: engine.run(next(turn), level=level, num_threads=threads)

        return level_latencies([run_at(self._level(i)) for i in range(self.levels)], self.dm.num_threads, LATENCY_SECONDS)

    def _accuracy(self, chunks: list[Chunk], outputs: list[Any], references: list[Any]) -> float:
        if self.metric is None:
            values = [agreement(output, reference) for output, reference in zip(outputs, references, strict=True)]
        else:
            values = [float(self.metric(output, chunk.labels)) for output, chunk in zip(outputs, chunks, strict=True)]
        return float(np.average(values, weights=[chunk.size for chunk in chunks]))

    def _engine(self) -> Engine:
        gates = {name: self.attachment.gate(name) for name in self.sites}
        return Engine(self.plan, self.sites, gates, num_threads=self.dm.num_threads)

    def _level(self, number: int) -> float:
        return number / (self.levels - 1)

    def _single(self, number: int) -> list[Tensor]:
        """Returns the flattened input of one held-out sample, or a whole chunk for a model of a fixed batch size."""
        chunk = self.held_out[number % len(self.held_out)] if not self.splittable else nth_sample(self.held_out, number)
        return self.dm.flat_inputs(*chunk.args, **chunk.kwargs)

    def _whole(self, chunk: Chunk) -> Any:
        return self.dm.model(*chunk.args, **chunk.kwargs)

    def _usefulness(self) -> Callable[[Mapping[str, float]], bool]:
        """Returns whether, with given keep ratios, enough of the held-out samples get the answer of the whole model."""
        self.report(0.55, "looking for the tightest useful level")
        chunks = self._affordable(self.held_out, THRESHOLD_MACS, 8)
        references = [self._whole(chunk) for chunk in chunks]
        return lambda keep: joint_agreement(self.attachment, chunks, keep, references) >= LEAST_AGREEMENT

    def _affordable(self, chunks: list[Chunk], macs: float, runs: int) -> list[Chunk]:
        """Returns as many of the samples as can pass `runs` times within these multiply-adds, at least 32."""
        count = max(LEAST_SAMPLES, int(macs / (runs * max(1, self.plan.macs))))
        return take(chunks, count, splittable=self.splittable)


@contextmanager
def eval_mode(dm: DynamicModel) -> Iterator[None]:
    training = [module for module in dm.modules() if module.training]
    dm.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
