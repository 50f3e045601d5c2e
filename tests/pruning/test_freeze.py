"""freeze: the static network does what the gated one does when every input skips the same, and exports."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from models import build
from networks import HeadsBlock, run_onnx
from torch import nn

from dynprune import DynamicModel, calibrate
from dynprune.errors import CalibrationError, InputError

X = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(4))
LEVEL = 1.0


@pytest.fixture(scope="module", params=["basic", "mbconv_se", "grouped", "generator", "causal"])
def calibrated(request) -> DynamicModel:
    dm = DynamicModel(build(request.param), X[:1]).eval()
    calibrate(dm, X.split(8), levels=3)
    return dm


def kept_lists(dm: DynamicModel, min_frequency: float) -> dict[str, list[int]]:
    """What stays, by the definition: the groups needed often enough, the one needed most always; a branch only if it is."""
    lists = {}
    for site in dm.sites:
        frequency = dm.gate(site.name).frequency(LEVEL)
        stays = frequency >= min_frequency
        if site.kind == "channels":
            stays[frequency.argmax()] = True
        lists[site.name] = stays.nonzero().flatten().tolist()
    return lists


@pytest.mark.parametrize("min_frequency", [0.05, 0.5])
def test_frozen_equals_the_gated_model_at_the_same_lists(calibrated, min_frequency):
    lists = kept_lists(calibrated, min_frequency)
    frozen = calibrated.freeze(LEVEL, min_frequency=min_frequency)
    assert not isinstance(frozen, DynamicModel)
    if "grouped" in str([site.name for site in calibrated.sites]) or any(m.groups > 1 and m.weight.shape[1] > 1 for m in convs(frozen)):
        lists = tied(calibrated, lists, frozen)
    with torch.no_grad():
        want = calibrated.run_with_active(X[:4], active={name: [chosen] * 4 for name, chosen in lists.items()})
        assert_close(frozen(X[:4]), want, factor=10)
    before = sum(p.numel() for p in calibrated.model.parameters())
    assert sum(p.numel() for p in frozen.parameters()) <= before + sum(m.out_channels for m in convs(frozen))


def test_heads_and_neurons_are_frozen():
    torch.manual_seed(1)
    x = torch.randn(24, 6, 16)
    dm = DynamicModel(nn.Sequential(HeadsBlock(), HeadsBlock(), nn.Linear(16, 4)).eval(), x[:1]).eval()
    calibrate(dm, x.split(8), levels=3)
    kept = kept_lists(dm, 0.5)
    branches = [site.name for site in dm.sites if site.kind == "branch"]
    for name in branches:  # a branch stays, so that what is inside it is looked at too
        dm.gate(name).record_frequency(torch.ones(3, 1))
    kept |= {name: [0] for name in branches}
    frozen = dm.freeze(LEVEL, min_frequency=0.5)
    with torch.no_grad():
        want = dm.run_with_active(x[:4], active={name: [chosen] * 4 for name, chosen in kept.items()})
        assert_close(frozen(x[:4]), want, factor=10)


def test_layers_that_run_again_stay_whole():
    x = torch.randn(24, 7, 16)
    dm = DynamicModel(build("layers_again"), x[:1]).eval()
    calibrate(dm, x.split(8), levels=3)
    with pytest.warns(RuntimeWarning, match="run several times"), torch.no_grad():
        assert_close(dm.freeze(LEVEL, min_frequency=1.0)(x), dm.model(x), factor=10)


def convs(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def tied(dm: DynamicModel, lists: dict[str, list[int]], frozen: nn.Module) -> dict[str, list[int]]:
    """Grouped convolutions lose a place in all their groups or in none: a site keeps whatever shares a place with what stays."""
    result = dict(lists)
    modules = dict(dm.model.named_modules())
    for site in dm.sites:
        layers = [modules[path] for path in (*site.producers, *(c.module_path for c in site.consumers)) if path in modules]
        groups = max((m.groups for m in layers if isinstance(m, nn.Conv2d) and 1 < m.groups < m.in_channels), default=1)
        if site.kind == "channels" and groups > 1:
            width = site.num_channels // groups
            places = {c % width for c in lists[site.name]}
            result[site.name] = [c for c in range(site.num_channels) if c % width in places]
    return result


def test_exports(calibrated, tmp_path):
    frozen = calibrated.freeze(LEVEL, min_frequency=0.5).eval()
    torch.export.export(frozen, (X[:2],))
    with torch.no_grad():
        assert_close(run_onnx(frozen, X[:2], tmp_path), frozen(X[:2]), factor=10)


def test_frequencies_are_recorded_saved_and_counted_anew(calibrated, tmp_path):
    for site in calibrated.sites:
        table = calibrated.gate(site.name).keep_frequency
        assert table.shape == (3, site.num_groups)
        assert (table[0] == 1).all() and (table >= 0).all() and (table <= 1).all()
    calibrated.save(tmp_path / "gates.safetensors")
    loaded = DynamicModel.load(tmp_path / "gates.safetensors", calibrated.model)
    name = calibrated.sites[0].name
    assert torch.equal(loaded.gate(name).keep_frequency, calibrated.gate(name).keep_frequency)
    with torch.no_grad():
        assert_close(loaded.freeze(LEVEL)(X), calibrated.freeze(LEVEL)(X))
    again = calibrated.freeze(LEVEL, inputs=X.split(8), min_frequency=0.3)
    assert again(X[:2]).shape == calibrated.model(X[:2]).shape


def test_gates_that_ignore_the_input_are_told():
    dm = DynamicModel(build("basic"), X[:1]).eval()
    assert "choose by the input" not in dm.explain()
    calibrate(dm, X.split(8), levels=3)
    assert f"of {len(dm.sites)} gates choose by the input" in dm.explain()
    for site in dm.sites:
        gate = dm.gate(site.name)
        gate.record_frequency(torch.ones(3, site.num_groups) * (torch.arange(site.num_groups) % 2 == 0))
    assert "The same groups are skipped for every input, so dm.freeze(1) does the same without gates" in dm.explain()


def test_bad_input():
    dm = DynamicModel(build("basic"), X[:1]).eval()
    with pytest.raises(CalibrationError, match="call calibrate"):
        dm.freeze(0.5)
    with pytest.raises(InputError, match="At level 0 everything runs"):
        dm.freeze(0)
    with pytest.raises(InputError):
        dm.freeze(1.5)
    with pytest.raises(InputError, match="`min_frequency` must be a share"):
        dm.freeze(0.5, min_frequency=0)
    with pytest.raises(CalibrationError, match="at least 2 samples"):
        dm.freeze(0.5, inputs=[])
    with pytest.raises(InputError, match="`keep_frequency` must have shape"):
        dm.gate(dm.sites[0].name).record_frequency(torch.ones(2, 3))
