"""Which level a sample runs at, what its masks cost, and the loss terms."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import assert_close
from patterns import samples
from torch.nn import functional as F

from dynprune.errors import CalibrationError, InputError
from dynprune.training.allocation import StepCost, predicted_ms
from dynprune.training.calibrate import calibrate
from dynprune.training.cost import RunCost, mac_costs
from dynprune.training.levels import sandwich_levels
from dynprune.training.loss import PRICE_RATE, GateLoss, distillation_loss

# ---------------------------------------------------------------- levels


@pytest.mark.parametrize("size", (1, 3, 4, 8, 64))
@pytest.mark.parametrize("tightest", (0.4, 1.0))
def test_an_eighth_runs_whole_and_a_quarter_at_the_tightest(size, tightest):
    levels = sandwich_levels(size, tightest=tightest, generator=torch.Generator().manual_seed(3))
    assert levels.shape == (size,) and levels.min() >= 0 and levels.max() <= tightest
    assert (levels == 0).sum() == size // 8 and (levels == tightest).sum() == size // 4


def test_levels_follow_the_generator():
    first, again, other = (sandwich_levels(16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("size", "tightest"), [(0, 1.0), (4, 0.0), (4, 1.5)])
def test_levels_need_sensible_arguments(size, tightest):
    with pytest.raises(InputError, match="must"):
        sandwich_levels(size, tightest=tightest)


def test_each_sample_runs_at_its_level(make_model):
    dm = make_model()
    x, _ = samples(6, 0)
    levels = torch.tensor([0.0, 0.2, 0.5, 0.5, 0.9, 1.0])
    output, masks = dm.attachment.run((x,), level=levels)
    for i, level in enumerate(levels.tolist()):
        alone, mask = dm.attachment.run((x[i : i + 1],), level=level)
        assert_close(output[i : i + 1], alone)
        for name, rows in masks.items():
            assert torch.equal(rows[i : i + 1], mask.get(name, torch.ones_like(rows[:1]))), name


def test_thresholds_of_a_tensor_are_those_of_its_numbers(make_model):
    gate = make_model().gate("block1.conv1")
    levels = torch.tensor([0.0, 1e-6, 0.01, 0.33, 0.5, 0.999, 1.0, 1.5])
    assert_close(gate.thresholds(levels)[1:], torch.tensor([gate.threshold(level) for level in levels.tolist()[1:]]))
    assert gate.thresholds(levels)[0] == float("-inf")


def test_levels_of_another_batch_are_refused(make_model):
    dm = make_model().train()
    dm.training_levels = sandwich_levels(5)
    with pytest.raises(InputError, match="one per sample, 4 here"):
        dm(samples(4, 0)[0])


def test_rescaled_gate_makes_the_same_choices(make_model):
    gate = make_model().gate("block1.conv1")
    torch.nn.init.normal_(gate.down)
    x = torch.randn(20, gate.in_channels)
    before = [gate.mask(x, level) for level in (0.2, 0.7, 1.0)]
    gate.rescale_(7.0)
    assert all(torch.equal(a, gate.mask(x, level)) for a, level in zip(before, (0.2, 0.7, 1.0), strict=True))


# ---------------------------------------------------------------- cost


COSTS = [StepCost(1.0, 4.0, ("a",)), StepCost(0.5, 2.0, ("a", "b"), ("c",)), StepCost(2.0, 0.0)]


def test_run_cost_is_the_predicted_time_of_each_sample():
    cost = RunCost(COSTS)
    assert cost.whole == 9.5 and set(cost.sites) == {"a", "b", "c"}
    keep = {"a": torch.tensor([1.0, 0.5, 0.2]), "b": torch.tensor([1.0, 0.3, 0.0]), "c": torch.tensor([1.0, 0.0, 1.0])}
    for i, got in enumerate(cost(keep).tolist()):
        assert got == pytest.approx(predicted_ms(COSTS, {name: share[i].item() for name, share in keep.items()}) / 9.5)
    assert cost({}).item() == 1


def test_multiply_adds_are_those_the_engine_counts(make_model):
    dm = make_model()
    cost = RunCost(mac_costs(dm.plan))
    assert cost.whole == dm.plan.macs
    dm.level = 0.8
    x, _ = samples(5, 1)
    with torch.no_grad():
        dm(x)
    _, masks = dm.attachment.run((x,), level=0.8)
    assert 1 - cost({name: mask.mean(1) for name, mask in masks.items()}).mean().item() == pytest.approx(dm.stats().skip_rate, abs=1e-6)


# ---------------------------------------------------------------- GateLoss


def masks_of(dm, keep: float, batch: int = 8) -> dict[str, torch.Tensor]:
    return {site.name: torch.full((batch, site.num_groups), keep) for site in dm.sites}


def test_loss_is_zero_at_its_target_and_grows_with_the_distance(make_model):
    dm = make_model()
    loss = GateLoss(dm, target_macs=0.5, floor=0.0)
    on_target = next(keep / 1000 for keep in range(1001) if loss.cost({s.name: keep / 1000 for s in dm.sites}) >= 0.5)
    near = loss(masks_of(dm, on_target), levels=1.0)
    assert near < 1e-4
    above, below = loss(masks_of(dm, on_target + 0.2), 1.0), loss(masks_of(dm, on_target - 0.2), 1.0)
    assert above > 0.05 and below > 0.05
    assert loss(masks_of(dm, 1.0), levels=torch.zeros(8)) == 0, "whole samples cost what they should"


def test_only_the_mean_at_a_level_counts(make_model):
    dm = make_model()
    loss = GateLoss(dm, target_macs=0.5, floor=0.0)
    channels = next(site.name for site in dm.sites if site.kind == "channels")
    half = {channels: torch.full((4, 16), 0.5)}
    easy_and_hard = {channels: torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None].expand(4, 16)}
    assert_close(loss(half, 1.0), loss(easy_and_hard, 1.0))


def test_floor_counts_sites_below_it(make_model):
    dm = make_model()
    free, floored = (GateLoss(dm, target_macs=0.5, floor=floor) for floor in (0.0, 0.3))
    masks = masks_of(dm, 0.6)
    masks[dm.sites[0].name][:] = 0.1
    assert floored(masks, 1.0) - free(masks, 1.0) == pytest.approx(10 * 0.2**2, rel=1e-4)


def test_loss_reads_the_last_call_and_its_gradient_reaches_the_gates_only(make_model):
    dm = make_model().train()
    gate_loss = GateLoss(dm, target_macs=0.5)
    x, _ = samples(16, 2)
    dm.training_levels = sandwich_levels(16)
    dm(x)
    gate_loss().backward()
    assert all(p.grad is None for p in dm.model.parameters())
    assert all(gate.bias.grad is not None and gate.bias.grad.abs().sum() > 0 for gate in dm.gates.values())
    assert not list(gate_loss.parameters()), "the model is not part of the loss"


def test_thresholds_move_until_each_level_costs_its_target(make_model):
    dm = make_model().train()
    gate_loss = GateLoss(dm, target_macs=0.6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for step in range(400):
            x, _ = samples(32, step)
            dm.training_levels = sandwich_levels(32, generator=generator)
            dm(x)
            gate_loss()
            gate_loss.follow()
        x, _ = samples(64, 1000)
        for level in (0.25, 0.5, 1.0):
            _, masks = dm.attachment.run((x,), level=level)
            cost = gate_loss.cost({name: mask.mean(1) for name, mask in masks.items()}).mean().item()
            assert cost == pytest.approx(1 - 0.4 * level, abs=0.06), level


def test_prices_add_up_what_was_missed(make_model):
    dm = make_model()
    gate_loss = GateLoss(dm, target_macs=0.5, floor=0.0)
    masks = {site.name: torch.ones(2, site.num_groups, requires_grad=True) for site in dm.sites}
    levels = torch.tensor([1.0, 1.0])
    first = gate_loss(masks, levels)
    assert_close(first, torch.tensor(10 * 0.5**2))  # all runs, half should
    for _ in range(3):
        gate_loss(masks, levels)
        gate_loss.follow()
    assert_close(gate_loss.prices, torch.tensor([0, 0, 0, 3 * PRICE_RATE * 0.5]))
    assert_close(gate_loss(masks, levels), first + 10 * gate_loss.prices[3] * 0.5)
    other = GateLoss(make_model(), target_macs=0.5)
    other.load_state_dict(gate_loss.state_dict())
    assert torch.equal(other.prices, gate_loss.prices)


def late_drift(dm, steps=400):
    """How far the threshold at level 1 moves in the last quarter of steps that pull all scores up, as a task does."""
    dm.train()
    gate_loss = GateLoss(dm, target_macs=0.6)
    optimizer = torch.optim.Adam(dm.gates.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    tightest = []
    for step in range(steps):
        dm.training_levels = sandwich_levels(32, generator=generator)
        optimizer.zero_grad()
        dm(samples(32, step)[0])
        pull = -3 * torch.stack([mask.mean() for mask in dm.masks.values()]).mean()
        (pull + gate_loss()).backward()
        optimizer.step()
        gate_loss.follow()
        tightest.append(dm.gate("block1.conv1").curve[-1].item())
    return tightest[-1] - tightest[-steps // 4]


def test_prices_end_the_race_of_scores_and_thresholds(make_model, monkeypatch):
    with_prices = late_drift(make_model())
    monkeypatch.setattr("dynprune.training.loss.PRICE_RATE", 0.0)
    without = late_drift(make_model())
    assert without > 0.1 and with_prices < 0.5 * without, (with_prices, without)


def test_own_training_loop(make_model):
    dm = make_model().train()
    gate_loss = GateLoss(dm, target_macs=0.6)
    optimizer = torch.optim.Adam(dm.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    costs = []
    for step in range(40):
        x, labels = samples(32, step)
        dm.training_levels = sandwich_levels(32, generator=generator)
        optimizer.zero_grad()
        output = dm(x)
        tight = dm.training_levels == 1
        costs.append(gate_loss.cost({name: mask.mean(1) for name, mask in dm.masks.items()})[tight].mean().item())
        (F.cross_entropy(output, labels) + gate_loss()).backward()
        optimizer.step()
        gate_loss.follow()
    assert abs(sum(costs[-5:]) / 5 - 0.6) < abs(costs[0] - 0.6) or abs(costs[0] - 0.6) < 0.05
    dm.eval()
    dm.level = 1.0
    x, _ = samples(8, 99)
    with torch.no_grad():
        assert_close(dm(x), dm.attachment.run((x,), level=1.0)[0], factor=10)


def test_loss_without_a_call_says_what_to_do(make_model):
    with pytest.raises(InputError, match="sandwich_levels"):
        GateLoss(make_model())()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_macs": 0.5, "target_ms": 3}, "not both"),
        ({"target_macs": 0.001}, "nearest is"),
        ({"target_macs": 1.0}, "nearest is 1"),
        ({"target_macs": float("nan")}, "cannot be met"),
        ({"floor": 1.0}, "floor"),
        ({"floor": -0.1}, "floor"),
        ({"weight": -1.0}, "weight"),
    ],
)
def test_bad_arguments_are_refused(make_model, arguments, message):
    with pytest.raises(InputError, match=message):
        GateLoss(make_model(), **arguments)


def test_milliseconds_need_a_cost_table(make_model, loader):
    dm = make_model()
    with pytest.raises(CalibrationError, match="calibrate"):
        GateLoss(dm, target_ms=1.0)
    calibrate(dm, loader, levels=4)
    scaled_ms = tuple(0.1 * number for number in range(len(dm.costs.scaled_ms)))
    dm.costs = replace(dm.costs, fixed_ms=(0.01,) * len(scaled_ms), scaled_ms=scaled_ms)  # not those of a busy machine
    whole_ms = sum(dm.costs.fixed_ms) + sum(dm.costs.scaled_ms)
    loss = GateLoss(dm, target_ms=0.9 * whole_ms)
    assert loss.target == pytest.approx(0.9)
    with pytest.raises(InputError, match=r"nearest is .* ms"):
        GateLoss(dm, target_ms=1e-9 * whole_ms)


# ---------------------------------------------------------------- distillation


def test_distillation_is_zero_for_the_same_answers_and_no_gradient_reaches_the_teacher():
    logits = torch.randn(6, 5, requires_grad=True)
    teacher = torch.randn(6, 5, requires_grad=True)
    assert_close(distillation_loss(logits, logits), torch.tensor(0.0))
    loss = distillation_loss(logits, teacher, temperature=2.0)
    want = 4 * F.kl_div((logits / 2).log_softmax(1), (teacher / 2).log_softmax(1), reduction="batchmean", log_target=True)
    assert_close(loss, want)
    loss.backward()
    assert logits.grad is not None and teacher.grad is None


def test_copies_of_a_model_train_on_their_own(make_model):
    dm = make_model()
    twin = copy.deepcopy(dm)
    dm.train()
    dm.training_levels = sandwich_levels(4)
    dm(samples(4, 0)[0])
    assert twin.training_levels is None and not twin.masks
