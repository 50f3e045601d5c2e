"""`finetune` on a small network: what it keeps, what it reaches, and what it refuses."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers import assert_close
from patterns import Net, samples
from safetensors import safe_open
from safetensors.torch import save_file

from dynprune.errors import CheckpointError, InputError, TrainingError
from dynprune.runtime.model import DynamicModel
from dynprune.training.calibrate import calibrate
from dynprune.training.cost import RunCost, mac_costs
from dynprune.training.costing import step_costs
from dynprune.training.finetune import finetune
from dynprune.training.loss import GateLoss
from dynprune.training.report import gate_report
from dynprune.training.samples import read_samples
from dynprune.training.settle import mean_cost, settle_levels

QUICK = {"epochs": 2, "levels": 4, "target_macs": 0.5}


@pytest.fixture(autouse=True)
def missed_targets_are_fine(monkeypatch):
    monkeypatch.setattr("dynprune.training.finetune.MISSED", 1.0)


def state_of(dm: DynamicModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in dm.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- what it does


def test_gates_alone_leave_the_model_as_it_is(make_model, loader):
    dm = make_model()
    x, _ = samples(8, 7)
    before, whole = copy.deepcopy(dm.model.state_dict()), dm.model(x).detach()
    frontier = finetune(dm, loader, train=("gates",), **QUICK)
    assert same(before, dm.model.state_dict())
    assert all(p.requires_grad and p.grad is None for p in dm.model.parameters())
    with torch.no_grad():
        assert_close(dm(x), whole)
    assert dm.frontier is frontier and len(frontier.points) == 4 and not dm.training


def test_joint_training_serves_every_level_on_the_engine(make_model, loader):
    dm = make_model()
    before = copy.deepcopy(dm.model.state_dict())
    random_state = torch.get_rng_state()
    seen = []
    finetune(dm, loader, epochs=6, levels=4, target_macs=0.5, lr=0.05, progress=lambda share, what: seen.append((share, what)))
    assert torch.equal(torch.get_rng_state(), random_state), "the caller's random state has changed"
    assert not torch.equal(before["block1.conv1.weight"], dm.model.block1.conv1.weight)
    assert [share for share, _ in seen] == sorted(share for share, _ in seen) and seen[-1] == (1.0, "trained")
    x, labels = samples(256, 900)
    for level in (0.0, 0.5, 1.0):
        dm.level = level
        dm.reset_stats()
        with torch.no_grad():
            got = dm(x)
        assert_close(got, dm.attachment.run((x,), level=level)[0], factor=10)
        assert (got.argmax(1) == labels).float().mean() > 0.7, level
    assert dm.stats().skip_rate > 0.3


def test_a_run_is_the_same_again_and_goes_on_from_its_checkpoint(make_model, loader, tmp_path):
    whole, again, parts = make_model(), make_model(), make_model()
    finetune(whole, loader, **QUICK, seed=3, checkpoint=tmp_path / "whole.pt")
    finetune(again, loader, **QUICK, seed=3)
    assert same(whole.model.state_dict(), again.model.state_dict())

    class Interrupted(Exception):
        pass

    def stop_in_second_epoch(share: float, what: str) -> None:
        if what.startswith("epoch 2/2"):
            raise Interrupted

    with pytest.raises(Interrupted):
        finetune(parts, loader, **QUICK, seed=3, checkpoint=tmp_path / "parts.pt", progress=stop_in_second_epoch)
    resumed = make_model()
    finetune(resumed, loader, **QUICK, seed=3, checkpoint=tmp_path / "parts.pt")
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(whole.gates.parameters(), resumed.gates.parameters(), strict=True))


def test_teacher_in_the_batch_without_labels(make_model, loader):
    dm = make_model()
    teacher = copy.deepcopy(dm.model)
    with torch.no_grad():
        taught = [(x, None, teacher(x)) for x, _ in loader]
    finetune(dm, taught, epochs=1, levels=2, target_macs=0.5, teacher=None, validation=loader)
    assert dm.frontier is not None


def test_own_loss_and_autocast(make_model, loader):
    dm = make_model()
    seen = []

    def loss(output, labels):
        seen.append(output.dtype)
        return torch.nn.functional.mse_loss(output, torch.nn.functional.one_hot(labels, 4).float())

    finetune(dm, loader, **QUICK, teacher=None, loss=loss, autocast=True)
    assert set(seen) == {torch.float32} and len(seen) == 2 * len(loader)
    assert all(p.dtype == torch.float32 for p in dm.parameters())


def test_target_in_milliseconds_of_the_cost_table(make_model, loader):
    dm = make_model()
    calibrate(dm, loader, levels=3)
    cost = GateLoss(dm, target_ms=0.999 * RunCost(step_costs(dm.plan, dm.costs)).whole).cost
    least = float(cost(dict.fromkeys(cost.sites, 0.3)))
    finetune(dm, loader, epochs=1, levels=4, target_ms=0.5 * (1 + least) * cost.whole)
    assert dm.frontier.points[-1].skip_rate > 0


def test_gates_are_not_fitted_again_where_that_is_not_wanted(make_model, loader):
    dm = make_model()
    finetune(dm, loader, **QUICK)
    up = dm.gate("block1.conv1").up.detach().clone()
    finetune(dm, loader, **QUICK, fit=False, gate_lr=1e-9)
    assert_close(dm.gate("block1.conv1").up, up, factor=100)


def test_missed_target_is_said(make_model, loader, monkeypatch):
    monkeypatch.setattr("dynprune.training.finetune.MISSED", -1.0)
    with pytest.warns(RuntimeWarning, match="target was not reached: level 1 costs"):
        finetune(make_model(), loader, epochs=1, levels=2, target_macs=0.5)


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"train": ("model",)}, "train"),
        ({"train": ()}, "train"),
        ({"train": ("gates", "heads")}, "train"),
        ({"lr": 0.0}, "lr"),
        ({"gate_lr": -1.0}, "gate_lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"distill": 1.5}, "distill"),
        ({"temperature": 0.0}, "temperature"),
        ({"levels": 1}, "levels"),
        ({"teacher": "resnet"}, "teacher"),
        ({"target_macs": 0.5, "target_ms": 1.0}, "not both"),
        ({"target_macs": 1e-4}, "nearest is"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_refused_and_change_nothing(make_model, loader, arguments, message):
    dm = make_model()
    before = state_of(dm)
    with pytest.raises(InputError, match=message):
        finetune(dm, loader, **arguments)
    assert same(before, state_of(dm))


X, Y = samples(8, 0)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "yields nothing"),
        (iter([(X, Y)]), "length"),
        (torch.zeros(4, 1, 8, 8), "length"),
        ([X, X], "no such tuple"),
        ([(X, Y), (X, torch.full((8,), 4))], r"\[0, 4\).*Batch 1|batch 1 of epoch 0 holds 4"),
        ([(X, Y), (X, Y - 5)], "holds -"),
        ([(X, Y[:5])], r"\[5, 8\]"),
        ([(X, None)], "nothing to learn"),
        ([(X, Y), (X / 0, Y)], "NaN or Inf"),
    ],
    ids=["empty", "no-length", "tensor", "no-pair", "label-high", "label-low", "sizes", "no-labels", "nan"],
)
def test_bad_loaders_are_refused(make_model, batches, message):
    with pytest.raises((InputError, ValueError), match=message):
        finetune(make_model(), batches, epochs=1, levels=2, target_macs=0.5, teacher=None, validation=[(X, Y)] * 4)


def test_model_without_sites_is_refused():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)).eval()
    with pytest.raises(InputError, match="no place that can be gated"):
        finetune(DynamicModel(net, X[:1]), [(X, Y)], epochs=1)


def test_loader_that_dries_up(make_model):
    class Dry:
        def __len__(self) -> int:
            return 3

        def __iter__(self):
            return iter(())

    with pytest.raises(InputError, match="yielded no batch"):
        finetune(make_model(), Dry(), epochs=1, levels=2, target_macs=0.5, validation=[(X, Y)] * 4)


@pytest.mark.parametrize("where", ("loss", "gradient"))
def test_training_stops_at_the_first_loss_that_is_not_finite(make_model, loader, where):
    dm, calls = make_model(), []
    states = []

    def loss(output, labels):
        calls.append(1)
        states.append(copy.deepcopy(dm.model.state_dict()))
        value = torch.nn.functional.cross_entropy(output, labels)
        if len(calls) < 4:
            return value
        return value * float("nan") if where == "loss" else (value * 0).clamp_min(0).sqrt()

    with pytest.raises(TrainingError, match=f"{where} is not finite at step 3"):
        finetune(dm, loader, **QUICK, teacher=None, loss=loss)
    assert all(torch.isfinite(value).all() for value in dm.state_dict().values())
    parameters = dict(dm.model.named_parameters())
    assert all(torch.equal(parameters[name], states[3][name]) for name in parameters), "the step was taken"
    assert states[3]["block1.bn1.num_batches_tracked"] == dm.model.block1.bn1.num_batches_tracked + 1, "its statistics were kept"
    assert dm.training_levels is None and not dm.masks and all(p.grad is None for p in dm.parameters())


def test_checkpoints_of_other_runs_are_refused(make_model, loader, tmp_path):
    path = tmp_path / "run.pt"
    finetune(make_model(), loader, **QUICK, checkpoint=path)
    with pytest.raises(CheckpointError, match="other settings: seed=0 there, 1 here"):
        finetune(make_model(), loader, **QUICK, checkpoint=path, seed=1)
    other = DynamicModel(Net().eval(), torch.zeros(1, 1, 8, 8))
    before = state_of(other)
    with pytest.raises(CheckpointError, match="another model or other weights"):
        finetune(other, loader, **QUICK, checkpoint=path)
    assert same(before, state_of(other))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        finetune(make_model(), loader, **QUICK, checkpoint=path)
    path.write_text("no checkpoint")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        finetune(make_model(), loader, **QUICK, checkpoint=path)


# ---------------------------------------------------------------- afterwards


def test_settled_levels_cost_their_targets(make_model, loader):
    dm = make_model()
    finetune(dm, loader, train=("gates",), epochs=1, levels=9, target_macs=0.4)
    chunks = read_samples(loader, labelled=False, num_inputs=1)
    cost = RunCost(mac_costs(dm.plan))
    least = mean_cost(dm, chunks, cost, 1.0)
    target = least + 0.1 * (1 - least)
    assert settle_levels(dm, chunks, cost, target) == pytest.approx(target, abs=0.02)
    least = mean_cost(dm, chunks, cost, 1.0)
    beyond = least - 0.05
    assert settle_levels(dm, chunks, cost, beyond) == pytest.approx(beyond, abs=0.02), "thresholds are raised where they cost too much"
    settle_levels(dm, chunks, cost, target)
    for level in (0.25, 0.5, 1.0):
        assert mean_cost(dm, chunks, cost, level) == pytest.approx(1 - level * (1 - target), abs=0.06)


def test_report_tells_whether_gates_depend_on_the_input(make_model, loader):
    dm = make_model()
    static = gate_report(dm, loader, level=0.7)
    assert not static.input_dependent and "dm.freeze(level)" in str(static)
    finetune(dm, loader, train=("gates",), **QUICK)
    report = gate_report(dm, loader)
    assert report.input_dependent and "freeze" not in str(report) and report.samples == 256
    for use in report.sites:
        assert use.name in str(report) and use.always <= use.keep_ratio <= 1 - use.never
    with pytest.raises(InputError, match="level"):
        gate_report(dm, loader, level=0.0)


def test_tuned_weights_are_saved_with_the_gates(make_model, loader, tmp_path):
    dm = make_model()
    finetune(dm, loader, **QUICK)
    path = tmp_path / "tuned.safetensors"
    dm.save(path, base=make_model().model)
    model = make_model().model
    loaded = DynamicModel.load(path, model)
    assert loaded.model is model and same(loaded.model.state_dict(), dm.model.state_dict())
    x, _ = samples(4, 1)
    loaded.level = dm.level = 0.8
    with torch.no_grad():
        assert torch.equal(loaded(x), dm(x))
    assert same(DynamicModel.load(path, model).state_dict(), loaded.state_dict()), "the tuned model is taken too"
    with pytest.raises(CheckpointError, match="other parameters"):
        DynamicModel.load(path, Net())
    with safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a dict
    tensors["tuned.head.weight"][5] ^= 1
    save_file(tensors, path, about)
    fresh, before = make_model().model, make_model().model.state_dict()
    with pytest.raises(CheckpointError, match="damaged"):
        DynamicModel.load(path, fresh)
    assert same(fresh.state_dict(), before), "a damaged file has changed the model"
    with pytest.raises(InputError, match="base"):
        dm.save(path, base=torch.nn.Linear(2, 2))
