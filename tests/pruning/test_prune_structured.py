"""prune: every architecture gives a smaller plain module that computes what the masked original does, to every kind of target."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import assert_close
from models import GATED, build, example
from networks import HeadsBlock, PlainAttention, ShuffleUnit, Transposed, quick, run_onnx, two_layers
from torch import nn
from torch.nn import functional as F

from dynprune import DynamicModel, load_pruned, prune, save_pruned
from dynprune.errors import CalibrationError, CheckpointError, InputError, UnsupportedModelError
from dynprune.graph.capture import capture
from dynprune.graph.macs import count_macs
from dynprune.pruning.recipe import Passthrough, Recipe, ZeroBranch
from dynprune.pruning.spaces import Anatomy
from dynprune.pruning.surgery import make_recipe, masked_output

EVERYTHING = ("channels", "neurons", "heads", "branches")
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def batches(count: int = 3, labels: bool = False):
    generator = torch.Generator().manual_seed(5)
    made = [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(count)]
    return [(x, torch.randint(10, (8,), generator=generator)) for x in made] if labels else made


HEADS_IN_THE_FORWARD = ("windows",)
"""Networks with nothing to cut but heads, whose forward needs all of them."""


@pytest.mark.parametrize("name", HEADS_IN_THE_FORWARD)
def test_networks_of_fixed_heads_are_refused(name):
    with pytest.raises(UnsupportedModelError, match="its forward does not take fewer channels"):
        quick(build(name), example(name), keep_ratio=0.5)


@pytest.mark.parametrize("coupled", [False, True], ids=["inner", "coupled"])
@pytest.mark.parametrize("name", [name for name in GATED if name not in HEADS_IN_THE_FORWARD])
def test_smaller_model_equals_the_masked_original(name, coupled):
    model, inputs = build(name), example(name, batch=2)
    before = copy.deepcopy(model.state_dict())
    small, report = quick(model, inputs, keep_ratio=0.5, coupled=coupled, criterion="random", scope="local")
    anatomy = Anatomy(capture(model, inputs), coupled=coupled)
    kept = {name: set(dims.get(0, ())) for name, dims in report.recipe.kept.items()}
    removed = set()
    for space in anatomy.spaces:
        part = next(part for part in space.parts if part.dim == 0)
        if part.tensor in kept:
            gone = {int(c) for i, c in enumerate(part.classes) if c >= 0 and i not in kept[part.tensor]}
            removed |= {int(space.atoms[c]) for c in gone}
    want = masked_output(model, anatomy.spaces, removed, [], inputs, {})
    with torch.no_grad():
        got = small(*inputs)
    assert want is not None or name == "gpt", "only a weight (in, out) has no module that can be masked"
    if want is not None:
        assert_close(got, want, factor=10)
    assert report.params_after < report.params_before
    assert report.macs_after == anatomy.macs_after(removed) < report.macs_before
    assert report.params_after == sum(p.numel() for p in small.parameters())
    assert make_recipe(anatomy, removed, [], model).kept == report.recipe.kept
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), f"{key} of the user's model changed"


@pytest.mark.parametrize("name", ["basic", "grouped", "vgg"])
def test_dynamic_model_training_and_export_on_top(name):
    small, _ = quick(build(name), example(name), keep_ratio=0.6, coupled=True)
    x = example(name, batch=3)
    dm = DynamicModel(small, x).eval()
    with torch.no_grad():
        assert_close(dm(*x), small(*x), factor=5)
    torch.export.export(small, x)
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01)
    small(*x).square().mean().backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@pytest.mark.parametrize("name", ["basic", "mbconv"])
def test_onnx_file_runs(name, tmp_path):
    small, _ = quick(build(name), example(name), keep_ratio=0.5, structures=EVERYTHING)
    (x,) = example(name)
    with torch.no_grad():
        assert_close(run_onnx(small, x, tmp_path), small(x), factor=10)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
def test_target_macs_is_kept_closely(scope, share):
    _, report = quick(build("bottleneck"), example("bottleneck"), target_macs=share, scope=scope, floor=0.0)
    assert share - 0.15 < report.macs_after / report.macs_before <= share
    _, absolute = quick(build("bottleneck"), example("bottleneck"), target_macs=share * report.macs_before, scope=scope, floor=0.0)
    assert absolute.macs_after == report.macs_after


@pytest.mark.parametrize("runtime", ["engine", "eager"])
def test_target_ms_is_measured(runtime):
    model = nn.Sequential(nn.Conv2d(8, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 8, 3, padding=1)).eval()
    x = torch.randn(1, 8, 32, 32)
    for _ in range(3):  # the speed of the machine may change between two measurements
        _, whole = prune(model, x, keep_ratio=1.0, runtime=runtime)
        assert whole.ms_before > 0 and whole.ms_after > 0 and whole.macs_after == whole.macs_before
        _, report = prune(model, x, target_ms=0.5 * whole.ms_before, runtime=runtime, floor=0.0)
        if report.macs_after < 0.9 * report.macs_before and report.ms_after < 0.9 * whole.ms_before:
            break
    else:
        pytest.fail(f"half the time was asked for, {whole.ms_before} ms became {report.ms_after} three times")
    assert f"latency ({runtime})" in str(report)


def test_targets_that_cannot_be_met_name_the_nearest():
    model, inputs = build("vgg"), example("vgg")
    nearest = quick(model, inputs, keep_ratio=0.0)[1].macs_after
    with pytest.raises(InputError, match=f"target_macs=10 cannot be met: the nearest is {nearest} of"):
        quick(model, inputs, target_macs=10)
    with pytest.raises(InputError, match=r"target_ms=1e-06 cannot be met on this machine with runtime='engine': the nearest is .* ms"):
        quick(model, inputs, target_ms=1e-6)


def test_local_scope_cuts_alike_global_by_score():
    model = build("mlp")
    with torch.no_grad():
        model[1].weight[::2] *= 1e-3
        model[3].weight *= torch.linspace(1, 1.1, 32)[:, None]
    _, local = quick(model, example("mlp"), keep_ratio=0.75, scope="local")
    assert [(c.before, c.after) for c in local.cuts] == [(64, 48), (32, 24)]
    _, everywhere = quick(model, example("mlp"), keep_ratio=0.75, scope="global")
    assert [(c.before, c.after) for c in everywhere.cuts] == [(64, 40), (32, 32)]
    assert everywhere.recipe.kept["1.weight"][0][:4] != [0, 1, 2, 3] and set(range(1, 64, 2)) <= set(everywhere.recipe.kept["1.weight"][0])


def test_rounding_and_floors():
    _, report = quick(build("mlp"), example("mlp"), keep_ratio=0.3, scope="local", round_to=8)
    assert [c.after for c in report.cuts] == [24, 16]
    _, report = quick(build("mlp"), example("mlp"), keep_ratio=0.0, floor={"1": 0.5, "*": 0.25})
    assert [c.after for c in report.cuts] == [32, 8]
    _, report = quick(build("mlp"), example("mlp"), keep_ratio=0.0, floor=0.0)
    assert [c.after for c in report.cuts] == [1, 1]


def test_include_and_exclude():
    _, report = quick(build("bottleneck"), example("bottleneck"), keep_ratio=0.5, exclude=("1.*",))
    assert {c.name for c in report.cuts if c.after < c.before} <= {"0.0", "2.a.0", "2.b.0"}
    assert ("1.a.0", "left out by `include` or `exclude`") in report.refused
    with pytest.raises(InputError, match=r"'nothing.*' matches no prunable space"):
        quick(build("bottleneck"), example("bottleneck"), keep_ratio=0.5, include=("nothing.*",))


@pytest.mark.parametrize("block", [HeadsBlock, PlainAttention])
@pytest.mark.parametrize("criterion", ["l2", "random"])
def test_heads_are_cut_whole(block, criterion):
    torch.manual_seed(3)
    model, x = block().eval(), torch.randn(2, 5, 16)
    small, report = quick(model, x, keep_ratio=0.5, structures=("heads",), criterion=criterion)
    (cut,) = report.cuts
    assert (cut.kind, cut.before, cut.after) == ("heads", 4, 2)
    assert report.macs_after == sum(count_macs(capture(small, x)).values())
    rows = report.recipe.kept["qkv.weight" if block is HeadsBlock else "q.weight"][0]
    assert all(set(rows[i : i + 4]) == set(range(rows[i], rows[i] + 4)) and rows[i] % 4 == 0 for i in range(0, len(rows), 4))
    assert small(x).shape == x.shape


def test_transposed_weights_and_tensors_without_dimensions():
    model, x = nn.Sequential(Transposed(24, 8), nn.GELU(), Transposed(8, 24)).eval(), torch.randn(2, 5, 8)
    small, report = quick(model, x, keep_ratio=0.5)
    assert [(c.kind, c.after) for c in report.cuts] == [("neurons", 12)]
    assert small[0].nf == small[2].nx == 12 and small[0].weight.shape == (8, 12)
    rows = report.recipe.kept["0.weight"][1]
    with torch.no_grad():
        want = model[2].bias + F.gelu(model[0](x))[..., rows] @ model[2].weight[rows] + model[2].shift
        assert_close(small(x), want)


def test_attention_that_needs_all_its_heads_is_refused():
    _, report = quick(build("attention"), example("attention"), keep_ratio=0.5)
    assert {c.kind for c in report.cuts} == {"neurons"}
    assert any(name == "0" and "its forward does not take fewer channels" in reason for name, reason in report.refused)


def test_target_is_met_after_places_were_refused():
    _, report = quick(build("attention"), example("attention"), target_macs=0.7)
    assert report.macs_after <= 0.7 * report.macs_before


def test_channel_shuffle_and_split():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), ShuffleUnit(), ShuffleUnit(), nn.Conv2d(16, 4, 1)).eval()
    small, report = quick(model, IMAGE, keep_ratio=0.5, criterion="random", scope="local")
    assert small(IMAGE).shape == model(IMAGE).shape
    assert [(c.name, c.after) for c in report.cuts] == [("1.first", 4), ("2.first", 4)]
    assert "0" in dict(report.refused), "its halves are of one size in the forward"


def test_zero_padded_shortcuts_keep_what_they_must():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.c(F.pad(x, (0, 0, 0, 0, 2, 2)) + self.b(x))

    small, report = quick(Padded().eval(), IMAGE, keep_ratio=0.5, coupled=True, floor=0.0)
    assert small(IMAGE).shape == (2, 4, 16, 16)
    (cut,) = report.cuts
    assert (cut.kind, cut.before) == ("coupled", 8)


def test_branches_are_taken_out():
    model = build("basic")
    with torch.no_grad():
        model[1].bn2.weight.fill_(1e-4)
    small, report = quick(model, IMAGE, keep_ratio=0.5, structures=("branches",), criterion="bn_scale")
    assert [(c.name, c.after) for c in report.cuts] == [("1", 0)]
    assert isinstance(small[1].bn2, ZeroBranch) and isinstance(small[1].conv1, Passthrough)
    assert not any(name.startswith("1.") for name, _ in small.named_parameters())
    assert report.macs_after == sum(count_macs(capture(small, IMAGE)).values())
    with torch.no_grad():
        model[1].bn2.weight.fill_(0)
        model[1].bn2.bias.fill_(0)
        assert_close(small(IMAGE), model(IMAGE))


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "activation", "taylor", "random"])
def test_branches_by_every_criterion_and_strided_ones(criterion):
    options = {"data": batches(labels=True), "loss": F.cross_entropy}
    small, report = quick(build("basic"), IMAGE, keep_ratio=0.0, floor=0.0, structures=("branches",), criterion=criterion, **options)
    assert [c.after for c in report.cuts] == [0, 0]
    assert small(IMAGE).shape == (2, 10)


def test_schedules_reach_the_same_goal_and_call_finetune():
    seen = []

    def finetune(small):
        seen.append(sum(p.numel() for p in small.parameters()))
        with torch.no_grad():
            small[1].weight.mul_(1.01)

    for schedule in ("linear", "cubic"):
        seen.clear()
        small, report = quick(build("mlp"), example("mlp"), keep_ratio=0.5, scope="local", schedule=schedule, steps=3, finetune=finetune)
        assert [(c.before, c.after) for c in report.cuts] == [(64, 32), (32, 16)]
        assert len(seen) == 3 and seen == sorted(seen, reverse=True)
        assert report.keep_ratio == pytest.approx(0.5, abs=0.01)
        assert list(small[1].weight.shape) == [32, 768] and len(report.recipe.kept["1.weight"][0]) == 32
    _, report = quick(build("basic"), IMAGE, target_macs=0.5, schedule="linear", steps=2, coupled=True)
    assert report.macs_after <= 0.5 * report.macs_before


def test_report_with_data_and_loss():
    model = build("basic")
    _, report = quick(model, IMAGE, keep_ratio=0.9, data=batches(labels=True), loss=F.cross_entropy, criterion="taylor")
    assert report.loss_before > 0 and np.isfinite(report.loss_after) and np.isfinite(report.predicted_loss)
    text = str(report)
    assert all(words in text for words in ("1.conv1", "channels", "parameters:", "multiply-adds:", "loss:", "predicted", "Not cut:"))


def test_compensation_puts_the_mean_into_the_bias():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[:3] = 0  # constant neurons
    x = torch.randn(64, 4)
    small, report = quick(model, x[:1], keep_ratio=0.5, data=list(x.split(16)))
    assert report.recipe.kept["0.weight"][0] == [3, 4, 5]
    assert report.recipe.biased == ("2",)
    assert_close(small(x), model(x))
    plain, _ = quick(model, x[:1], keep_ratio=0.5, data=list(x.split(16)), compensate=False)
    assert plain[2].bias is None


def test_saved_and_loaded_in_one_line(tmp_path):
    options = {"structures": EVERYTHING, "coupled": True, "data": batches(), "schedule": "linear", "steps": 2}
    small, report = quick(build("basic"), IMAGE, keep_ratio=0.5, **options)
    save_pruned(tmp_path / "small.safetensors", small, report.recipe)
    loaded = load_pruned(tmp_path / "small.safetensors", build("basic", seed=9))
    with torch.no_grad():
        assert_close(loaded(IMAGE), small(IMAGE))
    assert Recipe.from_json(report.recipe.to_json()) == report.recipe
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_pruned(tmp_path / "small.safetensors", build("vgg"))
    (tmp_path / "broken").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pruned(tmp_path / "broken", build("basic"))


def test_state_dict_goes_through_torch_save(tmp_path):
    small, report = quick(build("mbconv_se"), IMAGE, keep_ratio=0.5)
    torch.save(small.state_dict(), tmp_path / "state.pt")
    again = build("mbconv_se", seed=4)
    report.recipe.apply_(again)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        assert_close(again(IMAGE), small(IMAGE))


def test_keyword_inputs_and_training_mode_are_kept():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = two_layers()

        def forward(self, *, x):
            return self.net(x)

    model = Named().train()
    small, _ = quick(model, {"x": torch.randn(1, 4)}, keep_ratio=0.5)
    assert small.training and model.training and small.net[0].out_features == 3


@pytest.mark.parametrize(
    "options,message",
    [
        ({}, "exactly one of keep_ratio, target_macs and target_ms, got none"),
        ({"keep_ratio": 0.5, "target_ms": 3}, r"got \['keep_ratio', 'target_ms'\]"),
        ({"keep_ratio": 1.5}, "`keep_ratio` must be a share"),
        ({"keep_ratio": float("nan")}, "`keep_ratio` must be a share"),
        ({"target_macs": -1}, "`target_macs` must be a number > 0"),
        ({"target_ms": 0}, "`target_ms` must be a number > 0"),
        ({"keep_ratio": 0.5, "scope": "middle"}, "`scope` must be one of"),
        ({"keep_ratio": 0.5, "criterion": "magic"}, "`criterion` must be a callable or one of"),
        ({"keep_ratio": 0.5, "structures": ("layers",)}, "`structures` must be"),
        ({"keep_ratio": 0.5, "round_to": 0}, "`round_to` must be an int >= 1"),
        ({"keep_ratio": 0.5, "floor": 2.0}, "`floor` must be a share"),
        ({"keep_ratio": 0.5, "runtime": "gpu"}, "`runtime` must be one of"),
        ({"keep_ratio": 0.5, "schedule": "cubic", "steps": 0}, "`steps` must be an int >= 1"),
        ({"keep_ratio": 0.5, "steps": 2}, "'one_shot' is one round"),
        ({"keep_ratio": 0.5, "schedule": "often"}, "`schedule` must be one of"),
        ({"keep_ratio": 0.5, "finetune": 3}, "`finetune` must be a callable"),
        ({"keep_ratio": 0.5, "loss": 3}, "`loss` must be a callable"),
        ({"keep_ratio": 0.5, "criterion": "bn_scale"}, "needs a batch norm"),
        ({"keep_ratio": 0.5, "criterion": lambda space, evidence: [1.0]}, "must give 6 finite scores"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        quick(two_layers(), torch.randn(1, 4), **options)


def test_criteria_that_lack_data_or_gradients_say_so():
    model, x = two_layers(), torch.randn(8, 4)
    with pytest.raises(CalibrationError, match="needs data"):
        quick(model, x, keep_ratio=0.5, criterion="activation")
    with pytest.raises(CalibrationError, match="needs data and gradients"):
        quick(model, x, keep_ratio=0.5, criterion="taylor", data=[x])
    with pytest.raises(CalibrationError, match="must be a pair"):
        quick(model, x, keep_ratio=0.5, criterion="taylor", data=[x], loss=F.cross_entropy)
    with pytest.raises(CalibrationError, match="finite scalar"):
        labelled = [(x, torch.zeros(8, dtype=torch.long))]
        quick(model, x, keep_ratio=0.5, criterion="taylor", data=labelled, loss=lambda y, t: y.sum() * float("nan"))
    with pytest.raises(CalibrationError, match="`loss` failed on the output and labels of batch 0: Target 7 is out of bounds"):
        quick(model, x, keep_ratio=0.5, data=[(x, torch.full((8,), 7))], loss=F.cross_entropy)
    with pytest.raises(CalibrationError, match="holds NaN"):
        quick(model, x, keep_ratio=0.5, data=[x * float("nan")])
    with pytest.raises(CalibrationError, match="at least 2 samples"):
        quick(model, x, keep_ratio=0.5, data=[])


def test_nothing_to_cut_is_told():
    with pytest.raises(UnsupportedModelError, match="Nothing in this model can be cut"):
        quick(nn.Linear(3, 4).eval(), torch.randn(1, 3), keep_ratio=0.5)
