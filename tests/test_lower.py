"""Lowered plans, run by the plain interpreter, against the model; which steps a graph becomes; what sites become in the plan."""

from __future__ import annotations

import itertools
from collections import Counter

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_interpreter import channel_mask, run_graph
from helpers import LIST_KINDS, active_list, assert_close
from plan_interpreter import run_plan
from torch import nn
from torch.utils import _pytree as pytree

from dynprune.graph.capture import capture
from dynprune.graph.sites import Sites, find_sites
from dynprune.runtime.lower import lower
from dynprune.runtime.plan import Plan, Value, View

NO_SITES = Sites((), (), 0, {})


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def lowered(model: nn.Module, *example: torch.Tensor) -> Plan:
    return lower(capture(model.eval(), tuple(example)), NO_SITES)


def check(model: nn.Module, *example: torch.Tensor, factor: float = 1.0) -> Plan:
    """Lowers the model without gates, compares the plan with it at another batch size, and returns the plan."""
    plan = lowered(model, *example)
    inputs = [torch.cat([x, x.flip(-1), x]) for x in example]
    with torch.no_grad():
        want, got = model(*inputs), run_plan(plan, inputs).outputs
    for i, (g, w) in enumerate(zip(got, tensors(want), strict=True)):
        assert_close(g, w, factor=factor, context=f"output {i}")
    return plan


def ops(plan: Plan) -> Counter:
    return Counter(step.op for step in plan.steps)


class Lambda(nn.Module):
    """A model of one expression over its inputs and the modules it was given."""

    def __init__(self, function, *modules: nn.Module, **constants: torch.Tensor):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)
        for name, tensor in constants.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def image(channels: int = 4, size: int = 6, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(channels))


def tokens(length: int = 5, channels: int = 8) -> torch.Tensor:
    return torch.randn(1, length, channels, generator=torch.Generator().manual_seed(length))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# every architecture, whole


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("batch", [1, 5])
def test_plan_equals_the_model(name, batch):
    model, graph = models.captured(name)
    inputs = models.example(name, batch)
    with torch.no_grad():
        want = tensors(model(*inputs))
        got = run_plan(lower(graph, find_sites(graph)), tensors(inputs)).outputs
    for g, w in zip(tensors(got), want, strict=True):
        assert_close(g, w, factor=10)


# active lists


def random_active(sites: Sites, batch: int, kind: str) -> dict[str, list[list[int]]]:
    """Returns lists of one kind for every site; the samples differ where the kind is random."""
    rng = np.random.default_rng(len(kind))
    return {site.name: [active_list(kind, site.num_groups, rng).tolist() for _ in range(batch)] for site in sites.sites}


@pytest.mark.parametrize("name", models.GATED)
@pytest.mark.parametrize("kind", LIST_KINDS)
def test_plan_with_active_lists_equals_the_masked_graph(name, kind):
    _, graph = models.captured(name)
    sites = find_sites(graph)
    plan = lower(graph, sites)
    inputs = tensors(models.example(name, 3))
    chosen = random_active(sites, 3, kind)
    active = {site.name: chosen[site.name] for site in plan.sites if site.name in chosen}
    with torch.no_grad():
        (want,), values = run_graph(graph, inputs, sites, active)
        run = run_plan(plan, inputs, active)
    assert_close(run.outputs[0], want, factor=10)
    by_name = {site.name: site for site in sites.sites}
    for name, pooled in run.pooled.items():
        check_pooled(by_name[name], pooled, values, active, by_name)


def check_pooled(site, pooled, values, active, by_name):
    """A gate reads the means of its input's channels; those of a gated input that do not run count as zero."""
    value = values[site.gate_input]
    value = value if len(value) == len(pooled) else value.unflatten(0, (len(pooled), -1))
    dim = next(d for d in (1, value.ndim - 1) if value.shape[d] == site.gate_channels)
    if value.shape[1] == value.shape[-1]:
        dim = 1 if value.ndim == 4 else value.ndim - 1
    for other in by_name.values():
        if other.kind == "channels" and site.gate_input in other.nodes and other.name in active:
            value = value * channel_mask(other, active[other.name], value.shape[dim] // other.num_channels, value, dim)
    want = value.movedim(dim, 1).flatten(2).mean(-1) if value.ndim > 2 else value
    asked = pooled.isfinite().all(1)  # a gate inside a branch that is off is not
    assert_close(pooled[asked], want[asked], context=site.name)


class Gelu(nn.Module):
    """A residual block whose branch ends in an activation, so that no convolution can take the residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2, self.act = nn.Conv2d(channels, 12, 3, padding=1), nn.Conv2d(12, channels, 1), nn.GELU()

    def forward(self, x):
        return F.relu(self.act(self.conv2(F.relu(self.conv1(x)))) + x)


def outputs_with_lists(model: nn.Module, example: torch.Tensor, inputs: list, active: dict, group_size: int = 1):
    """Returns the plan, its output and the masked graph's."""
    graph = capture(model.eval(), (example,))
    sites = find_sites(graph, group_size=group_size)
    plan = lower(graph, sites)
    assert set(active) <= {site.name for site in plan.sites}
    with torch.no_grad():
        (want,), _ = run_graph(graph, inputs, sites, active)
        return plan, run_plan(plan, inputs, active).outputs[0], want


def test_a_branch_that_no_convolution_ends_is_handed_over():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), Gelu(8), Gelu(8))
    active = {"1": [[0], [], []], "2": [[], [0], []], "2.conv1": [[1, 5], [0, 11], []]}
    plan, got, want = outputs_with_lists(model, image(), [image(batch=3)], active)
    assert_close(got, want)
    additions = [step for step in plan.steps if "handover" in step.ints]
    assert [step.branches for step in additions] == [(i,) for i, site in enumerate(plan.sites) if site.kind == "branch"]


@pytest.mark.parametrize("group_size", [2, 4])
def test_groups_of_channels(group_size):
    active = {"1.conv1": [[0], [0, 2], []], "1": [[0], [0], [0]]}
    _, got, want = outputs_with_lists(nn.Sequential(nn.Conv2d(4, 8, 1), Gelu(8)), image(), [image(batch=3)], active, group_size)
    assert_close(got, want)


def test_pytorch_inside_a_branch_runs_when_a_sample_needs_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return x + self.conv2(self.conv1(x).cumsum(2))

    model = nn.Sequential(nn.Conv2d(4, 8, 1), Block())
    for chosen in ([[0], [], [0]], [[], [], []]):
        plan, got, want = outputs_with_lists(model, image(), [image(batch=3)], {"1": chosen})
        assert_close(got, want)
        (call,) = [step for step in plan.steps if step.op == "torch"]
        assert call.branches == (0,)


@pytest.mark.parametrize("name", models.GATED)
def test_every_site_is_honoured(name):
    _, graph = models.captured(name)
    sites = find_sites(graph)
    plan = lower(graph, sites)
    expected = {site.name for site in sites.sites}
    assert {site.name for site in plan.sites} == expected
    assert {reason_of for reason_of, _ in plan.ungated} == {site.name for site in sites.sites} - expected
    number = {site.name: i for i, site in enumerate(plan.sites)}
    for site in sites.sites:
        if site.name not in number:
            continue
        own = number[site.name]
        gate = next(i for i, step in enumerate(plan.steps) if step.op == "gate" and step.ints["site"] == [own])
        owned = [i for i, step in enumerate(plan.steps) if own in (step.in_site, step.out_site, *step.branches) and step.op != "gate"]
        assert gate < min(owned)
        if site.kind == "channels":
            assert {step.name for step in plan.steps if step.out_site == own} >= set(site.producers)
            readers = {node for step in plan.steps if step.in_site == own for node in step.nodes}
            assert readers >= {consumer.node for consumer in site.consumers}


def test_gates_of_one_input_share_its_means():
    _, graph = models.captured("basic")
    plan = lower(graph, find_sites(graph))
    read = [step.inputs for step in plan.steps if step.op == "gate"]
    assert len(read) > len(set(read))


def test_macs_are_counted_once():
    for name in models.NAMES:
        _, graph = models.captured(name)
        sites = find_sites(graph)
        assert lower(graph, sites).macs == sites.macs, name


def test_a_site_that_pytorch_interrupts_is_dropped_with_a_reason():
    _, graph = models.captured("basic")
    sites = find_sites(graph)
    relu = next(node for node in graph.nodes if node.op == "relu" and node.name in sites.sites[1].nodes)
    object.__setattr__(relu, "op", "relu_of_another_kind")
    try:
        plan = lower(graph, sites)
        got = run_plan(plan, tensors(models.example("basic", 2))).outputs[0]
    finally:
        object.__setattr__(relu, "op", "relu")
    reasons = dict(plan.ungated)
    assert set(reasons) == {site.name for site in sites.sites if relu.name in site.nodes and site.kind == "channels"}
    assert all("PyTorch" in reason for reason in reasons.values())
    assert_close(got, models.captured("basic")[0](*models.example("basic", 2)), factor=10)


# fusion: how many steps a graph becomes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # stem; conv1, conv2 + shortcut + relu of two blocks; a projection; pool and classifier
        pytest.param("basic", {"conv": 6, "mean": 1, "linear": 1}, id="basic"),
        pytest.param("vgg", {"conv": 2, "pool": 2, "adaptive_pool": 1, "linear": 2}, id="vgg"),
        pytest.param("mbconv", {"conv": 5, "depthwise": 2, "mean": 1, "linear": 1}, id="mbconv"),
        pytest.param("mbconv_se", {"conv": 5, "depthwise": 2, "mean": 3, "linear": 5, "binary": 2}, id="mbconv_se"),
        # every concatenation is free; a batch norm and relu after one is one step
        pytest.param("dense", {"conv": 5, "affine": 3, "mean": 1, "linear": 1}, id="dense"),
        pytest.param("fire", {"conv": 7, "pool": 1, "mean": 1, "linear": 1}, id="fire"),
        pytest.param("convnext", {"conv": 5, "depthwise": 2, "layer_norm": 2, "mean": 1, "linear": 1}, id="convnext"),
        pytest.param("same_padded", {"conv": 2, "mean": 1, "linear": 1}, id="same_padded"),
        pytest.param("mlp", {"linear": 3}, id="mlp"),
    ],
)
def test_steps_without_gates(name, expected):
    _, graph = models.captured(name)
    assert ops(lower(graph, NO_SITES)) == Counter(expected)


def conv_of(plan: Plan):
    (step,) = [step for step in plan.steps if step.op in ("conv", "linear", "depthwise")]
    return step


def test_scales_and_shifts_fold_into_the_convolution():
    conv, norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    scale = torch.randn(8, 1, 1)
    plan = check(Lambda(lambda m, x: F.relu((2 * m.parts[1](m.parts[0](x)) - 1) * m.scale / 3 + 0.5), conv, norm, scale=scale), image())
    assert ops(plan) == {"conv": 1}


def test_weights_without_fold_are_not_copied():
    conv = nn.Conv2d(4, 8, 3)
    assert np.shares_memory(conv_of(lowered(conv, image())).constants["weight"], conv.weight.detach().numpy())


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: (y := m.parts[0](x)) + F.relu(y), id="read-before-activation"),
        pytest.param(lambda m, x: [y := m.parts[0](x), F.relu(y)], id="returned-before-activation"),
        pytest.param(lambda m, x: (y := m.parts[0](x)) * 2 + y, id="read-before-scale"),
        pytest.param(lambda m, x: (y := m.parts[0](x)) + y, id="added-to-itself"),
        pytest.param(lambda m, x: F.relu(m.parts[0](x)) * 2 - 1, id="scaled-after-activation"),
        pytest.param(lambda m, x: F.relu(m.parts[0](x)) + x, id="residual-after-activation"),
        pytest.param(lambda m, x: (m.parts[0](x) + x) * 2, id="scaled-after-residual"),
        pytest.param(lambda m, x: m.parts[0](x) + x.mean((2, 3), keepdim=True), id="residual-that-broadcasts"),
        pytest.param(lambda m, x: m.parts[0](x).transpose(2, 3) + x, id="residual-transposed"),
        pytest.param(lambda m, x: m.parts[0](x).flatten(1) * m.weight, id="scale-per-position"),
        pytest.param(lambda m, x: [m.parts[0](x)[:, :2], F.relu(m.parts[0](x)[:, 1:])], id="slices"),
    ],
)
def test_what_must_not_fold_does_not(function):
    check(Lambda(function, nn.Conv2d(4, 4, 3, padding=1), weight=torch.randn(4 * 36)), image())


def test_residual_that_is_computed_later_moves_the_convolution():
    first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    plan = check(Lambda(lambda m, x: F.relu(m.parts[0](x) + F.gelu(m.parts[1](x))), first, second), image())
    assert ops(plan) == {"conv": 2}
    assert len(plan.steps[-1].inputs) == 2


# single operations


ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.25),
    "clamp": lambda x: x.clamp(min=-0.3),
    "clamp_max": lambda x: x.clamp_max(0.4),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 0.7),
    "softplus": F.softplus,
    "mish": F.mish,
    "exp": torch.exp,
    "log": lambda x: x.square().add(0.1).log(),
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: x.abs().add(1).rsqrt(),
    "neg": torch.neg,
    "square": lambda x: x**2,
    "root": lambda x: (x.square() + 1) ** 0.5,
    "reciprocal": lambda x: 1 / (x.abs() + 1),
    "erf": torch.erf,
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.3)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("fused", [False, True], ids=["alone", "after-conv"])
def test_activations(name, fused):
    function = ACTIVATIONS[name]
    model = Lambda(lambda m, x: function(m.parts[0](x)), nn.Conv2d(4, 4, 1)) if fused else Lambda(lambda m, x: function(x))
    assert ops(check(model, image()))["torch"] == 0


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_parameters_without_a_kernel_go_to_pytorch(beta):
    assert ops(check(Lambda(lambda m, x: F.softplus(x, beta)), image()))["torch"] == (beta != 1.0)


ON_ENGINE = {
    "integers": (Lambda(lambda m, x: m.parts[0](x).mean(1), nn.Embedding(10, 4)), torch.randint(0, 10, (1, 6))),
    "matmul": (Lambda(lambda m, x: x @ x.transpose(1, 2) @ m.parts[0](x), nn.Linear(8, 6)), tokens()),
    "matmul-heads": (
        Lambda(lambda m, x: (y := m.parts[0](x).unflatten(2, (2, 4)).transpose(1, 2)) @ y.mT, nn.Linear(8, 8)),
        tokens(),
    ),
    "matmul-broadcast": (
        Lambda(lambda m, x: x[:, None] @ m.parts[0](x).unflatten(2, (2, 8)).permute(0, 2, 3, 1), nn.Linear(8, 16)),
        tokens(),
    ),
    "bmm": (Lambda(lambda m, x: torch.bmm(x, m.parts[0](x).mT), nn.Linear(8, 8)), tokens()),
    "upsample-bilinear": (Lambda(lambda m, x: F.interpolate(m.parts[0](x), scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 1)), image()),
    "upsample-corners": (Lambda(lambda m, x: F.interpolate(x, (9, 4), mode="bilinear", align_corners=True)), image()),
    "upsample-bicubic": (Lambda(lambda m, x: F.interpolate(x, (4, 11), mode="bicubic")), image()),
    "upsample-antialiased": (Lambda(lambda m, x: F.interpolate(x, (3, 2), mode="bilinear", antialias=True)), image()),
    "upsample-nearest-part": (Lambda(lambda m, x: F.interpolate(x, (7, 5), mode="nearest")), image()),
    "upsample-linear": (Lambda(lambda m, x: F.interpolate(x.mT, 13, mode="linear")), tokens()),
    "roll": (Lambda(lambda m, x: m.parts[0](x).roll((1, -2), (2, 3)) * 2, nn.Conv2d(4, 4, 1)), image()),
    "stack": (Lambda(lambda m, x: torch.stack([m.parts[0](x), x * 2, x], 2).sum(2), nn.Conv2d(4, 4, 1)), image()),
    "transposed": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU()), image()),
    "transposed-overlapping": (nn.ConvTranspose2d(4, 6, 4, 2, 1), image()),
    "transposed-cut": (nn.ConvTranspose2d(4, 6, 3, 2, 2), image()),
    "transposed-output-padding": (nn.ConvTranspose2d(4, 6, 3, (2, 1), 1, (1, 0)), image()),
    "transposed-grouped": (nn.ConvTranspose2d(4, 8, 4, 2, 1, groups=2), image()),
    "transposed-depthwise": (nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=4), image()),
    "transposed-one-position": (nn.ConvTranspose2d(4, 6, 4), image(4, 1)),
    "transposed-1d": (Lambda(lambda m, x: m.parts[0](x.mT), nn.ConvTranspose1d(8, 6, 5, 3, 1)), tokens()),
    "vector-norm": (Lambda(lambda m, x: F.normalize(m.parts[0](x), dim=-1), nn.Linear(8, 8)), tokens()),
    "mean-over-rows": (Lambda(lambda m, x: (y := m.parts[0](x)) + y.mean(-1, keepdim=True).relu(), nn.Linear(8, 8)), tokens()),
    "cube": (Lambda(lambda m, x: m.parts[0](x) ** 3, nn.Conv2d(4, 4, 1)), image()),
    "addcmul": (Lambda(lambda m, x: torch.addcmul(m.a, m.b, x), a=torch.randn(8), b=torch.randn(8)), tokens()),
    "attention-one-head": (Lambda(lambda m, x: F.scaled_dot_product_attention(x, x, x).relu()), tokens()),
    "conv-stride-dilation": (nn.Conv2d(4, 6, 3, 2, 2, 2), image()),
    "conv-rectangular": (nn.Conv2d(4, 6, (3, 1), (1, 2), (1, 0)), image()),
    "conv-same-even-kernel": (nn.Conv2d(4, 6, 4, padding="same"), image()),
    "conv-grouped": (nn.Conv2d(4, 8, 3, groups=2), image()),
    "conv-one-channel": (nn.Conv2d(1, 1, 3), image(1)),
    "conv-multiplied-depthwise": (nn.Conv2d(4, 8, 3, groups=4), image()),
    "conv-depthwise": (nn.Conv2d(4, 4, 3, 2, 1, groups=4), image()),
    "conv-over-everything": (nn.Conv2d(4, 6, 6), image()),
    "conv-after-reflection": (nn.Sequential(nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(4, 6, 3, padding=1)), image()),
    "conv1d": (nn.Conv1d(8, 6, 3, 2, 1, dilation=2), tokens(8, 9)),
    "conv1d-same": (nn.Conv1d(8, 8, 3, padding="same", groups=8), tokens(8, 9)),
    "linear-tokens": (nn.Linear(8, 6), tokens()),
    "linear-vector": (nn.Linear(8, 6), torch.randn(1, 8)),
    "linear-one-token": (nn.Linear(8, 6), torch.randn(1, 1, 8)),
    "linear-image-last": (nn.Linear(6, 5), image()),
    "matmul-constant": (Lambda(lambda m, x: x @ m.w + 1, w=torch.randn(8, 3)), tokens()),
    "einsum-heads": (
        Lambda(lambda m, q, k, v: torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k), v)),
        (torch.randn(1, 5, 2, 4), torch.randn(1, 6, 2, 4), torch.randn(1, 6, 2, 4)),
    ),
    "einsum-weight": (Lambda(lambda m, x: torch.einsum("btc,dc->btd", x, m.w).relu(), w=torch.randn(3, 8)), tokens()),
    "einsum-turned": (Lambda(lambda m, x, y: torch.einsum("b n c, b m c -> b m n", x, y)), (tokens(), tokens())),
    "embedding-columns": (
        Lambda(
            lambda m, x: m.parts[0](x[:, 0]) * m.parts[1](x[:, 2]) + m.parts[0](x[:, 1:3]).sum(1), nn.Embedding(9, 4), nn.Embedding(5, 4)
        ),
        torch.randint(0, 5, (1, 4)),
    ),
    "batch-norm-alone": (nn.BatchNorm2d(4), image()),
    "batch-norm-1d": (nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), torch.randn(1, 8)),
    "batch-norm-after-flatten": (nn.Sequential(nn.Conv2d(4, 3, 1), nn.Flatten(), nn.BatchNorm1d(108)), image()),
    "batch-norm-plain": (nn.BatchNorm2d(4, affine=False), image()),
    "batch-norm-tokens": (nn.BatchNorm1d(5), tokens()),
    "layer-norm-tokens": (nn.LayerNorm(8), tokens()),
    "layer-norm-planar": (nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6, bias=False)), tokens()),
    "layer-norm-image": (nn.LayerNorm((4, 6, 6)), image()),
    "layer-norm-vector": (nn.LayerNorm(8, elementwise_affine=False), torch.randn(1, 8)),
    "group-norm": (nn.GroupNorm(2, 4), image()),
    "instance-norm": (nn.InstanceNorm2d(4), image()),
    "softmax-vector": (nn.Softmax(-1), torch.randn(1, 8)),
    "softmax-channels": (nn.Softmax(1), image()),
    "softmax-middle": (nn.Softmax(2), image()),
    "max-pool": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), image()),
    "max-pool-dilated": (nn.MaxPool2d(2, 1, 0, 2), image()),
    "max-pool-1d": (nn.MaxPool1d(3, 2), tokens(8, 9)),
    "avg-pool": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), image()),
    "avg-pool-divisor": (nn.AvgPool2d(2, divisor_override=3), image()),
    "avg-pool-all": (nn.AvgPool2d(6), image()),
    "adaptive-pool": (nn.AdaptiveAvgPool2d((4, 1)), image()),
    "adaptive-max-pool": (nn.AdaptiveMaxPool2d(2), image()),
    "adaptive-pool-1d": (nn.AdaptiveAvgPool1d(2), tokens(8, 9)),
    "mean-positions": (Lambda(lambda m, x: x.mean((2, 3))), image()),
    "mean-keepdim": (Lambda(lambda m, x: x.mean((-1, -2), keepdim=True)), image()),
    "mean-channels": (Lambda(lambda m, x: x.mean(1)), image()),
    "mean-tokens": (Lambda(lambda m, x: x.mean(1)), tokens()),
    "mean-outer-and-inner": (Lambda(lambda m, x: x.mean((1, 3))), image()),
    "sum": (Lambda(lambda m, x: x.sum((2, 3))), image()),
    "scalar-operands": (Lambda(lambda m, x: (3 - x) * 2 / 5 + 1 - x / 2), image()),
    "reciprocal-of-value": (Lambda(lambda m, x: 2 / (x.abs() + 1)), image()),
    "constant-per-channel": (Lambda(lambda m, x: x * m.c + m.c, c=torch.randn(4, 1, 1)), image()),
    "constant-with-batch-of-one": (Lambda(lambda m, x: x + m.c, c=torch.randn(1, 4, 6, 6)), image()),
    "constant-per-column": (Lambda(lambda m, x: x - m.c, c=torch.randn(6)), image()),
    "constant-per-row": (Lambda(lambda m, x: m.c / (x.abs() + 1), c=torch.randn(6, 1)), image()),
    "position-embedding": (Lambda(lambda m, x: m.parts[0](x) + m.c, nn.Linear(8, 6), c=torch.randn(1, 5, 6)), tokens()),
    "two-operands": (Lambda(lambda m, x: torch.maximum(x, x.flip(0).relu() - 1) - x.minimum(x * 2)), image()),
    "excite": (Lambda(lambda m, x: x * x.mean((2, 3), keepdim=True).sigmoid()), image()),
    "excite-first": (Lambda(lambda m, x: x.mean((2, 3), keepdim=True).abs().add(1) / x.abs().add(1)), image()),
    "spatial-attention": (Lambda(lambda m, x: x * x.mean(1, keepdim=True)), image()),
    "outer-product": (Lambda(lambda m, x: x.mean(2, keepdim=True) - x.mean(3, keepdim=True)), image()),
    "transposed-operands": (Lambda(lambda m, x: x + x.transpose(2, 3)), image()),
    "shuffle-channels": (Lambda(lambda m, x: x.view(-1, 2, 2, 6, 6).transpose(1, 2).reshape(-1, 4, 6, 6).relu()), image()),
    "to-tokens-and-back": (
        Lambda(lambda m, x: m.parts[0](x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x), nn.Linear(4, 4)),
        image(),
    ),
    "permute-and-back": (Lambda(lambda m, x: m.parts[0](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.Linear(4, 4)), image()),
    "batch-moves": (Lambda(lambda m, x: m.parts[0](x.transpose(0, 1)).transpose(0, 1), nn.Linear(8, 8)), tokens()),
    "batch-merges": (Lambda(lambda m, x: F.gelu(m.parts[0](x.reshape(-1, 8))).view(-1, 5, 3), nn.Linear(8, 3)), tokens()),
    "batch-merges-behind": (
        Lambda(lambda m, x: m.parts[0](x.transpose(0, 1).reshape(-1, 8)).view(5, -1, 3).transpose(0, 1), nn.Linear(8, 3)),
        tokens(),
    ),
    "slices": (Lambda(lambda m, x: x[:, 1:, ::2, 1:5:3] * 2), image()),
    "select": (Lambda(lambda m, x: x[:, -1] + x[:, :, 2]), image(6)),
    "chunk": (Lambda(lambda m, x: torch.mul(*x.chunk(2, 1))), image()),
    "split-ragged": (Lambda(lambda m, x: [y.relu() for y in x.split(3, 2)]), image(4, 7)),
    "split-sizes": (Lambda(lambda m, x: [y.relu() for y in x.split([1, 3], 1)]), image()),
    "unbind": (Lambda(lambda m, x: x.unbind(1)[2] - x.unbind(1)[0]), image()),
    "squeeze": (Lambda(lambda m, x: x.unsqueeze(1).squeeze(1).mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)), image()),
    "expand": (Lambda(lambda m, x: x[:, :1].expand(-1, 4, -1, -1) + x), image()),
    "pad-value": (Lambda(lambda m, x: F.pad(x, (1, 2, 0, 1), value=0.5)), image()),
    "pad-channels": (Lambda(lambda m, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))), image()),
    "crop": (Lambda(lambda m, x: F.pad(x, (-1, -2, 1, -1)).relu()), image()),
    "pad-read-twice": (Lambda(lambda m, x: m.parts[0](y := F.pad(x, (1, 1, 1, 1))) + y.mean(), nn.Conv2d(4, 4, 3)), image()),
    "cat": (Lambda(lambda m, x: torch.cat([m.parts[0](x), x, m.parts[0](x).relu()], 1).relu(), nn.Conv2d(4, 3, 1)), image()),
    "cat-twice-the-same": (Lambda(lambda m, x: torch.cat([(y := x * 2), y], 1)), image()),
    "cat-nested": (Lambda(lambda m, x: torch.cat([torch.cat([x * 2, x.relu()], 1), x.sigmoid()], 1)), image()),
    "cat-overlapping": (
        Lambda(lambda m, x: torch.cat([a := x.relu(), b := x * 2], 1).mean(1) + torch.cat([b, a], 1).mean(1)),
        image(),
    ),
    "cat-rows": (Lambda(lambda m, x: torch.cat([x, x * 2], 2)), image()),
    "cat-token": (
        Lambda(lambda m, x: torch.cat([m.c.expand(x.shape[0], -1, -1), m.parts[0](x)], 1), nn.Linear(8, 6), c=torch.randn(1, 1, 6)),
        tokens(),
    ),
    "cat-features": (Lambda(lambda m, x: torch.cat([m.parts[0](x), x], 2), nn.Linear(8, 6)), tokens()),
    "pixel-shuffle": (nn.PixelShuffle(2), image()),
    "upsample-nearest": (nn.Upsample(scale_factor=2), image()),
    "two-inputs": (Lambda(lambda m, x, y: x * y + m.parts[0](y), nn.Conv2d(4, 4, 1)), (image(), image() + 1)),
}  # fmt: skip


MOSTLY_ON_ENGINE = {"two-operands", "pad-read-twice"}  # flip(0) and mean() mix the batch


@pytest.mark.parametrize("name", ON_ENGINE)
def test_operation_runs_on_the_engine(name):
    model, example = ON_ENGINE[name]
    plan = check(model, *(example if isinstance(example, tuple) else (example,)), factor=2)
    if name not in MOSTLY_ON_ENGINE:
        assert ops(plan)["torch"] == 0


def read_late(m, x):
    """Reads a view of memory that the engine would have written again by then."""
    conv = m.parts[0]
    windows = (y := conv(x)).unfold(2, 2, 2).unfold(3, 2, 2)
    return conv(conv(conv(y + 1))).mean((2, 3)) + windows.amax((2, 3, 4, 5))


IN_PYTORCH = {
    "numbers-apart": (Lambda(lambda m, x: m.parts[0](x[:, ::2]).mean(1), nn.Embedding(10, 4)), torch.randint(0, 10, (1, 6))),
    "numbers-computed": (Lambda(lambda m, x: m.parts[0](x % 3).mean(1), nn.Embedding(10, 4)), torch.randint(0, 10, (1, 6))),
    "double": (Lambda(lambda m, x: (x.double() * 2).float() + x), image()),
    "unknown-op": (Lambda(lambda m, x: m.parts[0](x).cumsum(1).relu(), nn.Conv2d(4, 4, 1)), image()),
    "mixes-the-batch": (Lambda(lambda m, x: x - x.mean(0, keepdim=True)), image()),
    "size-of-the-batch": (Lambda(lambda m, x: x / x.shape[0] + 1), image()),
    "view-of-engine-memory": (Lambda(lambda m, x: m.parts[0](x).diagonal(0, 2, 3), nn.Conv2d(4, 4, 1)), image()),
    "view-read-late": (Lambda(read_late, nn.Conv2d(4, 4, 1)), image()),
    "several-results": (
        Lambda(lambda m, x: (y := m.parts[0](x)).topk(2, 1)[0] + y.max(1, keepdim=True)[0], nn.Conv2d(4, 4, 1)),
        image(),
    ),
    "pooling-with-indices": (Lambda(lambda m, x: F.max_pool2d(x, 2, return_indices=True)), image()),
    "random-shape-mask": (Lambda(lambda m, x: torch.where(x > 0, x, x.new_zeros(6, 6) - 1)), image()),
    "returned-view": (Lambda(lambda m, x: [x, x.transpose(1, 2), x.relu().transpose(0, 1)]), image()),
    "nothing-to-do": (Lambda(lambda m, x: [x, x, m.c], c=torch.randn(3)), image()),
    "batch-shuffled-into-channels": (Lambda(lambda m, x: x.reshape(-1, 36).relu().sum(1).reshape(-1, 4)), image()),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PYTORCH)
def test_what_the_engine_does_not_know_runs_in_pytorch(name):
    check(*IN_PYTORCH[name])


def test_a_fixed_batch_runs_in_pytorch():
    model = Lambda(lambda m, x: m.parts[0](x).reshape(2, -1) @ torch.ones(3 * 36, 1), nn.Conv2d(4, 3, 1))
    graph = capture(model.eval(), (image(batch=2),))
    if graph.dynamic_batch:
        pytest.skip("torch.export kept the batch free")
    plan = lower(graph, find_sites(graph))
    assert plan.fixed_batch == 2
    assert set(ops(plan)) == {"torch"}
    assert_close(run_plan(plan, [image(batch=2)]).outputs[0], model(image(batch=2)))


# where things lie


def test_outputs_have_memory_of_their_own():
    plan = lowered(Lambda(lambda m, x: (y := m.parts[0](x), y.relu(), y.transpose(1, 2), x, y), nn.Conv2d(4, 4, 1)), image())
    assert all(isinstance(output, View) for output in plan.outputs)
    assert {plan.buffers[output.buffer].kind for output in plan.outputs} == {"output"}
    assert plan.outputs[0] == plan.outputs[4]
    assert len({output.buffer for output in plan.outputs}) == 4


def test_results_that_are_no_tensors_are_returned_as_they_are():
    plan = lower(models.captured("two_inputs")[1], NO_SITES)
    assert None in plan.outputs and 3 in plan.outputs


def test_steps_whose_result_nobody_reads_are_dropped():
    def function(m, x):
        m.parts[0](x).relu()
        return x.flatten(0, 1).shape[0] * x

    assert ops(check(Lambda(function, nn.Conv2d(4, 4, 1)), image()))["conv"] == 0


def test_a_result_of_pytorch_is_dropped_after_its_last_reader():
    plan = check(Lambda(lambda m, x: x.cumsum(1).cumsum(2).cumsum(3).relu()), image())
    calls = [step.torch_call for step in plan.steps if step.torch_call]
    assert [set(call.last_use) for call in calls] == [set(), {calls[0].result}, {calls[1].result, calls[2].result}]
    assert calls[1].args[0] == Value(calls[0].result)
    assert calls[2].store is not None


def test_dense_blocks_concatenate_in_place():
    _, graph = models.captured("dense")
    plan = lower(graph, NO_SITES)
    convs = [step.output for step in plan.steps if step.op == "conv"]
    shared = Counter(rows.buffer for rows in convs)
    assert shared.most_common(1)[0][1] == 3  # the stem and the two layers' results
    parts = sorted((rows.offset, rows.offset + rows.rows * rows.row_stride) for rows in convs if rows.buffer == shared.most_common(1)[0][0])
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(parts))


def test_an_operand_is_copied_once_for_all_concatenations_that_share_it():
    def dense(m, x):
        y = m.parts[0](x)
        return torch.cat([x, y, m.parts[1](torch.cat([x, y], 1))], 1).relu()

    assert ops(check(Lambda(dense, nn.Conv2d(4, 3, 1), nn.Conv2d(7, 3, 1)), image())) == {"copy": 1, "conv": 2, "unary": 1}


def test_the_arena_is_smaller_than_all_values_together():
    _, graph = models.captured("bottleneck")
    plan = lower(graph, find_sites(graph))
    assert plan.arena_size < 0.5 * sum(buffer.size for buffer in plan.buffers if buffer.kind == "arena")


def marks(plan: Plan) -> list[tuple[str, int]]:
    return [(step.op, step.ints.get("fused", [0])[0]) for step in plan.steps]


def test_the_steps_of_an_inverted_residual_are_marked_to_run_as_one():
    x = torch.randn(1, 8, 12, 12)
    assert marks(check(models.InvertedResidual(8, 32, 8), x)) == [("conv", 0), ("depthwise", 0), ("conv", 2)]
    squeezed = marks(check(models.InvertedResidual(8, 32, 16, 2, 8), x))
    assert squeezed[:2] == [("conv", 0), ("depthwise", 1)] and not any(fused for _, fused in squeezed[2:])
    assert marks(check(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)), x)) == [("depthwise", 0), ("conv", 1)]


def test_a_chain_of_separable_convolutions_is_marked_in_disjoint_groups():
    parts = [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)]
    plan = check(nn.Sequential(*parts), torch.randn(1, 8, 12, 12))
    assert marks(plan) == [("depthwise", 0), ("conv", 1), ("depthwise", 0), ("conv", 1)]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (y := m.parts[0](x), m.parts[1](y)),
        lambda m, x: m.parts[1](y := m.parts[0](x)) + y,
        lambda m, x: m.parts[1](m.parts[0](x).cumsum(2)),
    ],
    ids=["returned", "read-twice", "pytorch-between"],
)
def test_steps_whose_values_others_read_are_not_marked(function):
    plan = check(Lambda(function, nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)), torch.randn(1, 8, 12, 12))
    assert not any(fused for _, fused in marks(plan))


def test_what_marked_steps_read_stays_until_the_last_of_them():
    plan = check(nn.Sequential(nn.Conv2d(3, 8, 1), models.InvertedResidual(8, 32, 16), nn.Conv2d(16, 4, 1)), torch.randn(1, 3, 12, 12))
    last = next(i for i, step in enumerate(plan.steps) if "fused" in step.ints)
    read, written = plan.steps[last - 2].inputs[0], plan.steps[last].output
    begins = [plan.buffers[rows.buffer].offset + rows.offset for rows in (read, written)]
    assert begins[0] + read.rows * read.positions <= begins[1] or begins[1] + written.rows * written.positions <= begins[0]


def test_values_of_the_batch_size_alone_are_constants():
    def masked(m, x):
        positions = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        mask = positions[:, None, :, None] >= positions[:, None, None, :]
        return (
            F.scaled_dot_product_attention(*(m.parts[0](x).unflatten(2, (2, 4)).transpose(1, 2),) * 3, mask) + positions[:, None, :, None]
        )

    plan = check(Lambda(masked, nn.Linear(8, 8)), tokens(), factor=2)
    assert ops(plan)["torch"] == 0


def test_attention_mask_that_depends_on_the_input_is_an_operand():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return F.scaled_dot_product_attention(x, x, x, mask[:, None, None].bool())

    x, mask = torch.randn(1, 2, 5, 4), torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0]])
    plan = lowered(Masked(), x, mask)
    inputs = [x.repeat(2, 1, 1, 1), torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 1, 0, 1]])]
    assert_close(run_plan(plan, inputs).outputs[0], Masked()(*inputs), factor=2)
    assert ops(plan)["attention"] == 1


def test_multiply_adds_of_a_node_in_several_steps_are_counted_once():
    model = nn.ConvTranspose2d(4, 6, 3, 2, 1)
    graph = capture(model, image())
    sites = find_sites(graph)
    plan = lower(graph, sites)
    assert plan.macs == sites.macs == 4 * 6 * 9 * 36 and ops(plan)["conv"] == 4
