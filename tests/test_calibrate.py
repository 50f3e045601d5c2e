"""Calibration: reading samples, the closed-form fits, the allocation over sites, and the whole on a small network."""

from __future__ import annotations

import math
from itertools import pairwise

import models
import numpy as np
import pytest
import torch
from helpers import assert_close
from torch import nn

from dynprune.errors import CalibrationError, InputError
from dynprune.graph.sites import Consumer, Site
from dynprune.runtime.costs import CostTable, plan_signature
from dynprune.runtime.model import DynamicModel
from dynprune.runtime.profile import fit_to_latencies, measure_costs
from dynprune.training import calibrate as calibration
from dynprune.training.allocation import FLOOR, Sensitivity, StepCost, allocate, predicted_ms
from dynprune.training.calibrate import calibrate
from dynprune.training.costing import allocation_costs, step_costs
from dynprune.training.outputs import TEMPERATURE, agreement, output_errors
from dynprune.training.samples import CHUNK, MAX_SAMPLES, nth_sample, read_samples, split, take
from dynprune.training.scores import ConsumerRecord, Regression, SiteRecord, fit_channels, quantile


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(calibration, "LATENCY_SECONDS", 0.005)


def batches(count: int = 3, size: int = 16, name: str = "basic") -> list[torch.Tensor]:
    return [models.example(name, batch=size, seed=seed)[0] for seed in range(count)]


# ---------------------------------------------------------------- samples


X, Y = torch.arange(10.0)[:, None], torch.arange(10)


@pytest.mark.parametrize(
    ("batch", "labelled", "num_inputs", "expected"),
    [
        (X, False, 1, ((X,), {}, None)),
        ([X, Y], False, 1, ((X,), {}, None)),
        ((X, X), False, 2, ((X, X), {}, None)),
        (((X, X), Y), False, 2, ((X, X), {}, None)),
        ({"x": X}, False, None, ((), {"x": X}, None)),
        ((X, Y), True, None, ((X,), {}, Y)),
        (((X, X), Y), True, 2, ((X, X), {}, Y)),
        (({"x": X}, Y.tolist()), True, 1, ((), {"x": X}, Y.tolist())),
    ],
    ids=["tensor", "pair", "two-inputs", "two-inputs-labels", "dict", "labelled", "two-inputs-labelled", "dict-labelled"],
)
def test_batches_come_in_many_forms(batch, labelled, num_inputs, expected):
    (chunk,) = read_samples([batch], labelled=labelled, num_inputs=num_inputs)
    args, kwargs, labels = expected
    order = (chunk.args + tuple(chunk.kwargs.values()))[0].flatten().long()
    assert sorted(order.tolist()) == list(range(10))
    assert len(chunk.args) == len(args)
    assert chunk.kwargs.keys() == kwargs.keys()
    assert all(got.flatten().long().equal(order) for got in (*chunk.args, *chunk.kwargs.values()))
    assert labels is None or torch.as_tensor(chunk.labels).equal(order)


def test_a_data_loader_of_dicts():
    data = [{"x": X[i], "mask": torch.ones(1, dtype=torch.bool)} for i in range(10)]
    chunks = read_samples(torch.utils.data.DataLoader(data, batch_size=4), labelled=False, num_inputs=2)
    assert [(chunk.size, chunk.args, sorted(chunk.kwargs)) for chunk in chunks] == [(10, (), ["mask", "x"])]
    assert chunks[0].kwargs["x"].sort(0).values.equal(X)


def test_small_batches_are_joined_and_large_ones_cut():
    chunks = read_samples([X] * 20 + [torch.zeros(300, 1)], labelled=False, num_inputs=1)
    assert [chunk.size for chunk in chunks] == [CHUNK] * 7 + [500 - 7 * CHUNK]
    assert [c.size for c in read_samples([X] * 3, labelled=False, num_inputs=1, splittable=False)] == [10, 10, 10]


def test_large_samples_run_in_smaller_chunks():
    chunks = read_samples([torch.zeros(20, 3, 400, 400)], labelled=False, num_inputs=1)
    assert [chunk.size for chunk in chunks] == [8, 8, 4]


def test_reading_stops_at_the_limit():
    def endless():
        while True:
            yield torch.zeros(300, 1)

    assert sum(chunk.size for chunk in read_samples(endless(), labelled=False, num_inputs=1)) == MAX_SAMPLES


def test_samples_of_other_shapes_stay_apart():
    chunks = read_samples([torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(4, 2)], labelled=False, num_inputs=1)
    assert sorted(chunk.args[0].shape for chunk in chunks) == [(4, 3), (8, 2)]


@pytest.mark.parametrize("total", [2, 3, 10, 64, 100, 640])
def test_split_keeps_every_sample_once(total):
    chunks = read_samples([torch.arange(total)[:, None].float()], labelled=False, num_inputs=1)
    fitted, held_out = split(chunks)
    values = [torch.cat([chunk.args[0] for chunk in part]).flatten() for part in (fitted, held_out)]
    assert torch.cat(values).sort().values.equal(torch.arange(float(total)))
    assert 1 <= len(values[1]) <= max(1, total // 3)
    assert sum(chunk.size for chunk in take(fitted, 7)) == min(7, len(values[0]))
    assert nth_sample(chunks, total - 1).args[0].equal(chunks[-1].args[0][-1:])


@pytest.mark.parametrize(
    ("inputs", "labelled", "message"),
    [
        ([], False, "at least 2 samples.* held 0"),
        ([torch.zeros(1, 3)], False, "at least 2 samples.* held 1"),
        (torch.zeros(4, 3), False, "iterable of batches.*Tensor"),
        ([torch.zeros(4, 3), torch.full((4, 3), math.nan)], False, "Batch 1 .*NaN or Inf"),
        ([torch.full((4, 3), math.inf)], False, "Batch 0 .*NaN or Inf"),
        ([torch.zeros(4, 3)], True, r"pair \(inputs, labels\); batch 0"),
        ([(torch.zeros(4, 3), torch.zeros(3))], True, "4 samples but 3 labels"),
        ([(torch.zeros(4, 3), torch.zeros(3, 3))], False, r"Batch 0|batch 0 has \[3, 4\]"),
    ],
    ids=["empty", "one", "tensor", "nan", "inf", "unlabelled", "labels", "sizes"],
)
def test_unusable_inputs_are_refused(inputs, labelled, message):
    with pytest.raises(CalibrationError, match=message):
        read_samples(inputs, labelled=labelled, num_inputs=2)


# ---------------------------------------------------------------- fits


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_regression_finds_a_low_rank_map_on_raw_features(rank):
    features = torch.randn(400, 12).double() * torch.logspace(-2, 2, 12).double() + 3
    truth = torch.randn(12, rank).double() @ torch.randn(rank, 7).double()
    targets = (features / torch.logspace(-2, 2, 12).double()) @ truth
    down, up, bias = Regression(features).low_rank(targets, rank)
    assert (down.shape, up.shape) == ((rank, 12), (7, rank))
    assert_close((features @ down.T @ up.T + bias).float(), targets.float(), factor=1e3)


def test_regression_does_not_read_noise():
    features = torch.randn(60, 50).double()
    held_out = torch.randn(500, 50).double()
    targets = torch.randn(60, 3).double()
    down, up, bias = Regression(features).low_rank(targets, 3)
    predictions = held_out @ down.T @ up.T + bias
    assert predictions.std() < 0.6, "a fit without penalty would give a spread far above that of the targets, 1"


def test_regression_survives_a_constant_feature_and_few_samples():
    features = torch.cat([torch.randn(3, 4), torch.ones(3, 1)], 1).double()
    assert all(torch.isfinite(part).all() for part in Regression(features).low_rank(torch.rand(3, 6).double(), 4))


def a_site(num_channels: int = 8, group_size: int = 1) -> Site:
    return Site("s", "channels", num_channels, group_size, ("p",), (Consumer("c", "c"),), 1, 0.1, "x", 4, frozenset())


def a_record(values: torch.Tensor, pooled: torch.Tensor, norms: torch.Tensor | None = None) -> SiteRecord:
    """A record of one consumer that saw `values` (N, channels, positions)."""
    norms = torch.ones(values.shape[1]) if norms is None else norms
    return SiteRecord([pooled], [ConsumerRecord([values.sum(2)], [values.square().sum(2)], values.shape[2], norms, True)])


def test_the_gate_finds_which_channels_an_input_needs():
    kind = torch.randint(0, 2, (200,))
    pooled = nn.functional.one_hot(kind, 4).float() + 0.1 * torch.randn(200, 4)
    values = torch.rand(200, 8, 9)
    values[kind == 0, :4] *= 0.01
    values[kind == 1, 4:] *= 0.01
    fit = fit_channels(a_site(), a_record(values, pooled), 2, compensate=False)
    kept = pooled @ fit.down.T @ fit.up.T + fit.bias
    needed = torch.stack([kind == 1] * 4 + [kind == 0] * 4, 1)
    assert (kept > quantile(kept, 0.5)).eq(needed).float().mean() > 0.98


def test_contributions_count_the_weights_and_the_compensation():
    values = torch.ones(50, 4, 9) * torch.tensor([5.0, 1.0, 1.0, 1.0])[None, :, None]  # the first is large but constant
    values = values + torch.randn(50, 4, 9) * torch.tensor([0.1, 1.0, 1.0, 1.0])[None, :, None]
    record = a_record(values, torch.randn(50, 4), torch.tensor([1.0, 1.0, 3.0, 1.0]))
    plain, compensated = (fit_channels(a_site(4), record, 1, compensate=c) for c in (False, True))
    assert plain.bias.argmax() == 0
    assert compensated.bias.argmin() == 0
    assert compensated.bias.argmax() == 2
    assert plain.means.eq(0).all() and not plain.compensated.any()
    assert compensated.means[0, 0] == pytest.approx(5.0, abs=0.05)


def test_means_are_those_of_the_samples_that_skip():
    small = torch.arange(100) % 2 == 0
    values = torch.where(small[:, None, None], 0.2, 4.0) + 0.1 * torch.rand(100, 2, 9)
    values[:, 1] = 3 * torch.rand(100, 9)
    pooled = small[:, None].float() * torch.ones(4)
    fit = fit_channels(a_site(2), a_record(values, pooled), 1, compensate=True)
    assert 0.2 <= fit.means[0, 0] <= 0.3, "the mean over all samples is 2.15"


def test_groups_add_up_their_channels():
    values = torch.randn(80, 6, 9) * torch.tensor([1.0, 1.0, 0.1, 0.1, 3.0, 0.1])[None, :, None]
    fit = fit_channels(a_site(6, group_size=2), a_record(values, torch.randn(80, 4)), 1, compensate=False)
    assert fit.bias.argsort().tolist() == [1, 0, 2]


def test_output_errors_are_divergences_or_relative():
    logits, other = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    p, q = (logits / TEMPERATURE).softmax(1), (other / TEMPERATURE).softmax(1)
    assert_close(output_errors(other, logits), torch.tensor([0.0, (p[1] * (p[1] / q[1]).log()).sum()]))
    assert agreement(other, logits) == 0.5
    images = torch.ones(2, 3, 4)
    assert_close(output_errors({"y": images * 1.1}, {"y": images}), torch.full((2,), 0.01))
    assert agreement(images * 1.1, images) == pytest.approx(0.9, abs=1e-5)


# ---------------------------------------------------------------- allocation


def test_sensitivity_goes_through_convex_measurements_and_never_falls():
    sensitivity = Sensitivity({0.75: 0.01, 0.5: 0.09, 0.25: 0.36})
    assert [sensitivity.error(keep) for keep in (1.0, 0.75, 0.5, 0.25)] == pytest.approx([0.0, 0.01, 0.09, 0.36])
    noisy = Sensitivity({0.75: 0.05, 0.5: 0.04, 0.25: 0.06})
    errors = [noisy.error(1 - i / 40) for i in range(31)]
    assert all(a <= b for a, b in pairwise(errors))
    slopes = [b - a for a, b in pairwise(errors)]
    assert all(a <= b + 1e-9 for a, b in pairwise(slopes)), "the hull must be convex"


def test_predicted_time_multiplies_rows_columns_and_branches():
    costs = [StepCost(1.0, 10.0, ("a", "b"), ("branch",)), StepCost(2.0, 0.0)]
    assert predicted_ms(costs, {}) == 13
    assert predicted_ms(costs, {"a": 0.5, "b": 0.5, "branch": 0.5}) == 2 + 0.5 * (1 + 2.5)


COSTS = [StepCost(0.5, 4.0, ("cheap",)), StepCost(0.5, 4.0, ("dear",)), StepCost(0.1, 0.2, ("slow",), ("branch",))]
ERRORS = {
    "cheap": Sensitivity({0.75: 0.0001, 0.5: 0.001, 0.25: 0.01}),
    "dear": Sensitivity({0.75: 0.1, 0.5: 0.5, 0.25: 2.0}),
    "slow": Sensitivity({0.75: 0.1, 0.5: 0.5, 0.25: 2.0}),
    "branch": Sensitivity({0.75: 0.1, 0.5: 0.5, 0.25: 2.0}),
}


def test_allocation_takes_first_what_costs_least_error_per_time():
    keeps = allocate(COSTS, ERRORS, 9)
    assert keeps[0] == dict.fromkeys(ERRORS, 1.0)
    assert keeps[-1] == dict.fromkeys(ERRORS, FLOOR)
    assert keeps[3]["cheap"] < keeps[3]["dear"]
    assert keeps[6]["dear"] < keeps[6]["slow"], "the same error saves less time in the small step"


@pytest.mark.parametrize("levels", [2, 5, 32])
def test_allocation_is_monotone_and_even_in_time(levels):
    keeps = allocate(COSTS, ERRORS, levels)
    assert len(keeps) == levels
    assert all(after[name] <= before[name] for before, after in pairwise(keeps) for name in ERRORS)
    times = [predicted_ms(COSTS, keep) for keep in keeps]
    for level, time_ms in enumerate(times):
        target = times[0] - (times[0] - times[-1]) * level / (levels - 1)
        assert target - 0.3 <= time_ms <= target + 1e-6


def test_allocation_does_not_shrink_what_a_skipped_branch_saves():
    costs = [StepCost(0.0, 1.0, ("inner",), ("branch",))]
    free = Sensitivity({0.25: 0.0})
    keeps = allocate(costs, {"inner": Sensitivity({0.25: 1.0}), "branch": free}, 3)
    assert keeps[1]["branch"] < 1
    assert keeps[1]["inner"] == 1


# ---------------------------------------------------------------- the whole


def wrapped(name: str = "basic") -> DynamicModel:
    return DynamicModel(models.build(name), models.example(name)).eval()


def test_calibrate_fills_gates_and_frontier():
    dm = wrapped()
    x = models.example("basic", batch=4, seed=9)[0]
    with torch.no_grad():
        whole = dm.model(x)
    frontier = calibrate(dm, batches(), levels=6)
    assert dm.frontier is frontier
    assert [point.level for point in frontier.points] == pytest.approx([i / 5 for i in range(6)])
    first, last = frontier.points[0], frontier.points[-1]
    assert (first.skip_rate, first.accuracy) == (0.0, 1.0)
    assert last.skip_rate > 0.4
    assert last.predicted_ms < first.predicted_ms
    assert all(gate.calibrated and len(gate.curve) == 6 for gate in dm.gates.values())
    assert dm.costs.fits(dm.plan) and dm.costs.level_ms.shape == (6, len(dm.plan.steps))
    with torch.no_grad():
        assert_close(dm(x), whole, factor=10)


@pytest.mark.parametrize("name", ["basic", "mbconv_se", "attention"])
def test_engine_equals_the_hooked_model_after_calibration(name):
    dm = wrapped(name)
    calibrate(dm, batches(name=name), levels=4)
    x = models.example(name, batch=5, seed=9)[0]
    for level in (0.2, 0.6, 1.0):
        dm.level = level
        with torch.no_grad():
            hooked, masks = dm.attachment.run((x,), level=level)
            assert_close(dm(x), hooked, factor=20, context=f"level {level}")
    assert any(not mask.all() for mask in masks.values()), "nothing is skipped at level 1"


def test_skip_rates_hold_on_new_inputs():
    dm = wrapped()
    frontier = calibrate(dm, batches(8), levels=5)
    for point in frontier.points[1:]:
        dm.reset_stats()
        dm.level = point.level
        with torch.no_grad():
            for x in batches(11)[8:]:
                dm(x)
        assert dm.stats().skip_rate == pytest.approx(point.skip_rate, abs=0.08)


def test_metric_and_progress_are_called():
    dm = wrapped()
    said = []
    labelled = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in batches()]
    metric = lambda output, labels: (output.argmax(1) == labels).float().mean().item()  # noqa: E731
    frontier = calibrate(dm, labelled, levels=3, metric=metric, progress=lambda share, what: said.append((share, what)))
    with torch.no_grad():
        share = torch.cat([dm.model(x) for x in batches()]).argmax(1).eq(0).float().mean().item()
    assert frontier.points[0].accuracy == pytest.approx(share, abs=0.35)
    assert [share for share, _ in said] == sorted(share for share, _ in said)
    assert said[-1][0] == 1.0


def test_a_model_not_captured_yet_is_captured_by_its_first_batch():
    dm = DynamicModel(models.build("basic")).eval()
    assert len(calibrate(dm, batches(2), levels=2).points) == 2


def test_a_failure_leaves_the_gates_as_they_were():
    dm = wrapped()
    before = {name: value.clone() for name, value in dm.gates.state_dict().items()}

    def broken(output, labels):
        raise RuntimeError("the metric broke")

    dm.train()
    with pytest.raises(RuntimeError, match="the metric broke"):
        calibrate(dm, [(x, torch.zeros(len(x))) for x in batches()], levels=3, metric=broken)
    assert all(value.equal(before[name]) for name, value in dm.gates.state_dict().items())
    assert dm.frontier is None
    assert dm.training and dm.model.training


@pytest.mark.parametrize("levels", [1, 0, 2.5, True])
def test_levels_must_be_two_or_more(levels):
    with pytest.raises(InputError, match="`levels` must be an int >= 2"):
        calibrate(wrapped(), batches(), levels=levels)


def test_a_model_without_sites_is_refused():
    dm = DynamicModel(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(1, 3, 4)).eval()
    with pytest.raises(CalibrationError, match="no place that can be gated"):
        calibrate(dm, [torch.rand(8, 3, 4)])


# ---------------------------------------------------------------- costs


def test_a_cost_table_is_scaled_to_the_measured_latencies():
    dm = wrapped()
    plan = dm.plan
    count = len(plan.steps)
    table = CostTable((0.01,) * count, (0.02,) * count, np.zeros((0, count)), plan_signature(plan))
    shares = [{site.name: torch.tensor([keep, keep]) for site in plan.sites} for keep in (1.0, 0.7, 0.4)]
    guessed, skip_rates = fit_to_latencies(plan, table, shares, [1.0] * 3)
    fixed_ms, scaled_ms = 3 * np.asarray(table.fixed_ms), 0.5 * np.asarray(table.scaled_ms)
    true = CostTable(tuple(fixed_ms), tuple(scaled_ms), table.level_ms, table.signature)
    costs = step_costs(plan, true)
    latencies = [predicted_ms(costs, {site.name: keep for site in plan.sites}) for keep in (1.0, 0.7, 0.4)]
    fitted, _ = fit_to_latencies(plan, table, shares, latencies)
    assert fitted.fixed_ms == pytest.approx(true.fixed_ms, rel=1e-6)
    assert fitted.scaled_ms == pytest.approx(true.scaled_ms, rel=1e-6)
    assert fitted.level_ms.sum(1) == pytest.approx(latencies, rel=1e-6)
    assert skip_rates[0] == 0 and skip_rates == sorted(skip_rates)
    assert min(guessed.fixed_ms + guessed.scaled_ms) > 0, "no latency, however odd, makes a step free"


def test_measured_costs_know_which_steps_follow_their_rows():
    dm = wrapped()
    x = models.example("basic")[0]
    table = measure_costs(dm.engine_for(x), [x], {site.name: site for site in dm.sites})
    assert table.fits(dm.plan)
    for step, fixed, scaled in zip(dm.plan.steps, table.fixed_ms, table.scaled_ms, strict=True):
        assert fixed >= 0
        assert (scaled > 0) == (step.in_site >= 0 or step.out_site >= 0), step.name


def test_the_allocation_mixes_measured_times_with_multiply_adds():
    plan = wrapped().plan
    count = len(plan.steps)
    table = CostTable((0.0,) * count, (0.25,) * count, np.zeros((0, count)), plan_signature(plan))
    costs = allocation_costs(plan, table)
    for step, cost in zip(plan.steps, costs, strict=True):
        assert cost.scaled_ms == pytest.approx(0.125 + 0.125 * count * step.macs / plan.macs)
        assert cost.fixed_ms == 0
