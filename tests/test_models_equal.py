"""The two equalities of the project: the engine at level 0 is the model, and at given lists it is the hooked model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from functools import cache

import models
import numpy as np
import pytest
import torch
from helpers import LIST_KINDS, active_list, assert_close
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision_models import torchvision_model

from dynprune.graph.macs import count_macs
from dynprune.graph.sites import Site
from dynprune.runtime.model import DynamicModel

TORCHVISION = {
    "resnet18": 64,
    "resnet50": 64,
    "vgg11_bn": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "squeezenet1_1": 96,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
}
"""Name to the image size that keeps the test quick."""
ALL = (*models.NAMES, *TORCHVISION)
GATED = (*models.GATED, *TORCHVISION)
FACTOR = 10.0
"""1e-4 relative: ten times the tolerance of one operation."""


@cache
def wrapped(name: str) -> DynamicModel:
    """Returns the wrapped model, shared by all tests of this file; each leaves its gates as it found them."""
    model = models.build(name) if name in models.NAMES else small_outputs(torchvision_model(name))
    return DynamicModel(model, inputs_of(name, 1))


def small_outputs(model: nn.Module) -> nn.Module:
    """Gives branches of an untrained network the weight they have in a trained one, so that an error in one is seen in the output."""
    for module in model.modules():
        if isinstance(getattr(module, "layer_scale", None), nn.Parameter):
            nn.init.constant_(module.layer_scale, 0.5)
    return model


def inputs_of(name: str, batch: int) -> tuple:
    if name in models.NAMES:
        return models.example(name, batch)
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, 3, TORCHVISION[name], TORCHVISION[name], generator=generator),)


def assert_same(got, want, context: str) -> None:
    """Fails where two results differ in structure, or in a tensor by more than 1e-4 of its largest magnitude."""
    got_leaves, got_spec = pytree.tree_flatten(got)
    want_leaves, want_spec = pytree.tree_flatten(want)
    assert got_spec == want_spec, f"{context}: {got_spec}, expected {want_spec}"
    for i, (a, b) in enumerate(zip(got_leaves, want_leaves, strict=True)):
        if not isinstance(b, Tensor):
            assert a == b, f"{context}: leaf {i} is {a!r}, expected {b!r}"
            continue
        assert a.dtype == b.dtype, f"{context}: leaf {i} is {a.dtype}, expected {b.dtype}"
        scale = b.detach().double().abs().max().clamp_min(1e-30)  # relative, also where outputs are small
        assert_close(a.double() / scale, b.double() / scale, factor=FACTOR, context=f"{context}, leaf {i}")


def random_lists(dm: DynamicModel, batch: int, rng: np.random.Generator, kind: str) -> dict[str, list[list[int]]]:
    """Returns lists for every site; `kind` "mixed" draws a kind for each site and sample."""
    lists = {}
    for site in dm.sites:
        kinds = rng.choice(LIST_KINDS, batch) if kind == "mixed" else [kind] * batch
        lists[site.name] = [active_list(k, site.num_groups, rng).tolist() for k in kinds]
    return lists


def expected_macs(dm: DynamicModel, masks: Mapping[str, Tensor], batch: int) -> float:
    """Returns the multiply-adds that masks (batch, num_groups) leave, counted from the graph and sites alone."""
    producers: dict[str, list[str]] = {}
    consumers: dict[str, list[str]] = {}
    branches: dict[str, list[str]] = {}
    for site in dm.sites:
        for node in site.nodes if site.kind == "branch" else ():
            branches.setdefault(node, []).append(site.name)
        for node in site.nodes if site.kind == "channels" else ():
            producers.setdefault(node, []).append(site.name)
        for consumer in site.consumers:
            consumers.setdefault(consumer.node, []).append(site.name)
    total = 0.0
    for node, macs in count_macs(dm.graph).items():
        share = torch.ones(batch, dtype=torch.float64)
        for name in {*producers.get(node, ()), *consumers.get(node, ())}:
            share = share * masks[name].double().mean(1)
        for name in branches.get(node, ()):
            share = share * masks[name].double()[:, 0]
        total += macs * share.sum().item()
    return total


def masks_of(dm: DynamicModel, lists: Mapping[str, list[list[int]]], batch: int) -> dict[str, Tensor]:
    masks = {}
    for site in dm.sites:
        masks[site.name] = torch.zeros(batch, site.num_groups)
        for sample, chosen in enumerate(lists[site.name]):
            masks[site.name][sample, chosen] = 1
    return masks


@pytest.mark.parametrize("batch", (1, 5))
@pytest.mark.parametrize("name", ALL)
def test_level_0_is_the_model(name: str, batch: int) -> None:
    dm, inputs = wrapped(name), inputs_of(name, batch)
    kept = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    dm.reset_stats()
    with torch.no_grad():
        want = dm.model(*inputs)
        got = dm(*inputs)
        again = dm(*inputs)
    assert_same(got, want, f"{name} batch {batch}")
    assert_same(again, want, f"{name} batch {batch}, second call")
    assert dm.stats().inferences == 2, "the calls did not run on the engine"
    for before, after in zip(kept, inputs, strict=True):
        assert not isinstance(after, Tensor) or torch.equal(before, after), "the engine changed its input"


@pytest.mark.parametrize("name", ALL)
def test_sites_are_those_that_engine_and_hooks_both_gate(name: str) -> None:
    dm = wrapped(name)
    names = [site.name for site in dm.sites]
    assert names or name not in GATED
    assert [site.name for site in dm.plan.sites] == names
    assert [site.name for site in dm.attachment.sites] == names
    assert len(dm.gates) == len(names)


@pytest.mark.parametrize(
    ("name", "batch", "kind"),
    [
        *itertools.product(models.GATED, (1, 3), ("empty", "all", "random", "mixed")),
        *itertools.product(TORCHVISION, (2,), ("empty", "mixed")),
    ],
)
def test_given_lists_mean_the_same_in_engine_and_hooked_model(name: str, batch: int, kind: str) -> None:
    dm, inputs = wrapped(name), inputs_of(name, batch)
    lists = random_lists(dm, batch, np.random.default_rng(batch), kind)
    with torch.no_grad():
        want = dm.run_with_active(*inputs, active=lists, backend="hooked")
        got = dm.run_with_active(*inputs, active=lists)
    assert_same(got, want, f"{name} batch {batch} {kind}")
    if kind == "all":
        assert_same(got, dm.model(*inputs), f"{name} batch {batch} with everything active")


@pytest.mark.parametrize("name", GATED)
def test_compensation_means_the_same_in_engine_and_hooked_model(name: str) -> None:
    dm, inputs = wrapped(name), inputs_of(name, 3)
    rng = np.random.default_rng(1)
    before = {key: value.clone() for key, value in dm.gates.state_dict().items()}
    changed = 0
    for site in dm.sites:
        if site.kind == "channels":
            gate = dm.gate(site.name)
            gate.channel_means.normal_()
            gate.compensated.copy_(torch.from_numpy(rng.random(len(site.consumers)) < 0.7))
            changed += int(gate.compensated.sum())
    assert changed or all(site.kind == "branch" for site in dm.sites)
    dm.refresh()
    try:
        for kind in ("empty", "mixed"):
            lists = random_lists(dm, 3, rng, kind)
            with torch.no_grad():
                want = dm.run_with_active(*inputs, active=lists, backend="hooked")
                got = dm.run_with_active(*inputs, active=lists)
            assert_same(got, want, f"{name}, compensated, {kind}")
        with torch.no_grad():
            assert_same(dm(*inputs), dm.model(*inputs), f"{name} at level 0 with compensation set")
    finally:
        dm.gates.load_state_dict(before)
        dm.refresh()


@pytest.mark.parametrize(
    ("name", "backend"), [*itertools.product(models.GATED, ("engine", "hooked")), *((name, "engine") for name in TORCHVISION)]
)
def test_skip_rate_is_what_the_lists_leave_out(name: str, backend: str) -> None:
    dm = wrapped(name)
    rng = np.random.default_rng(2)
    dm.reset_stats()
    total = left = 0.0
    ran = {site.name: 0 for site in dm.sites}
    for batch in (1, 3):
        inputs, lists = inputs_of(name, batch), random_lists(dm, batch, rng, "mixed")
        with torch.no_grad():
            dm.run_with_active(*inputs, active=lists, backend=backend)
        left += expected_macs(dm, masks_of(dm, lists, batch), batch)
        total += batch * sum(count_macs(dm.graph).values())
        for site in dm.sites:
            ran[site.name] += sum(map(len, lists[site.name]))
    stats = dm.stats()
    assert stats.inferences == 2 and stats.samples == 4
    assert stats.skip_rate == pytest.approx(1 - left / total, abs=1e-6)


@pytest.mark.parametrize(("name", "group_size"), [("basic", 8), ("mbconv_se", 4), ("grouped", 8), ("convnext", 16), ("attention", 16)])
def test_groups_of_channels_mean_the_same_in_engine_and_hooked_model(name: str, group_size: int) -> None:
    inputs = inputs_of(name, 3)
    dm = DynamicModel(models.build(name), inputs, group_size=group_size)
    assert any(site.kind == "channels" and site.num_groups == site.num_channels // group_size for site in dm.sites)
    lists = random_lists(dm, 3, np.random.default_rng(4), "mixed")
    with torch.no_grad():
        want = dm.run_with_active(*inputs, active=lists, backend="hooked")
        assert_same(dm.run_with_active(*inputs, active=lists), want, f"{name} in groups of {group_size}")


def on_around(dm: DynamicModel, site: Site, masks: Mapping[str, Tensor]) -> Tensor:
    """Returns per sample 1 where all branches that hold the site run, else 0."""
    around = [other for other in dm.sites if other.kind == "branch" and other is not site and site.nodes < other.nodes]
    return torch.stack([masks[other.name][:, 0] for other in around]).prod(0) if around else torch.ones(len(masks[site.name]))


def randomise_gates(dm: DynamicModel) -> None:
    """Gives every gate random weights and thresholds that about half of its scores exceed, and compensates some consumers."""
    generator = torch.Generator().manual_seed(5)
    for site in dm.sites:
        gate = dm.gate(site.name)
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        gate.set_curve(torch.linspace(-1, 0.7, 5) + (0.0 if site.kind == "channels" else torch.linspace(-2, 0, 5)))
        gate.calibrated.fill_(True)
        if site.kind == "channels":
            gate.channel_means.normal_(generator=generator)
            gate.compensated[0] = True


@pytest.mark.parametrize("level", (0.3, 1.0))
@pytest.mark.parametrize("name", (*models.GATED, "resnet18", "mobilenet_v3_small", "densenet121"))
def test_gates_choose_the_same_in_engine_and_hooked_model(name: str, level: float) -> None:
    dm = copy.deepcopy(wrapped(name))
    inputs, batch = inputs_of(name, 4), 4
    with torch.no_grad():
        randomise_gates(dm)
        dm.level = level
        want, masks = dm.attachment.run(inputs, level=level)
        got = dm(*inputs)
    assert set(masks) == {site.name for site in dm.sites}
    all_macs = batch * sum(count_macs(dm.graph).values())
    stats = dm.stats()
    assert stats.inferences == 1 and stats.level == pytest.approx(level)
    assert stats.skip_rate > 0.05, "the thresholds of this test are too low to test anything"
    for site in dm.sites:
        ran = masks[site.name].mean(1) * on_around(dm, site, masks)
        assert stats.site_skip_rates[site.name] == pytest.approx(1 - ran.mean().item(), abs=1e-6), site.name
    assert stats.skip_rate == pytest.approx(1 - expected_macs(dm, masks, batch) / all_macs, abs=1e-6)
    assert_same(got, want, f"{name} at level {level}")


@pytest.mark.parametrize("name", GATED)
def test_whole_sites_skip_nothing(name: str) -> None:
    dm, inputs = wrapped(name), inputs_of(name, 2)
    dm.reset_stats()
    with torch.no_grad():
        dm(*inputs)
        dm.run_with_active(*inputs, active={})
    stats = dm.stats()
    assert stats.skip_rate == 0.0
    assert set(stats.site_skip_rates) == {site.name for site in dm.sites}
    assert all(rate == 0.0 for rate in stats.site_skip_rates.values())
