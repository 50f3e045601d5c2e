"""find_sites(): the places an expert would gate, the reasons for the others, and that a site's channels really are independent."""

from __future__ import annotations

import itertools

import models
import pytest
import torch
from helpers import assert_close
from test_capture import run_graph
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode
from torchvision_models import torchvision_model

from dynprune.errors import InputError
from dynprune.graph.capture import capture
from dynprune.graph.sites import MIN_MACS_SHARE, Site, Sites, find_sites


def sites_of(name: str) -> Sites:
    return find_sites(models.captured(name)[1])


def summary(found: Sites) -> list[tuple]:
    """Returns (name, channels, producers, consumers) of the channel sites and (name, mask_output) of the branches."""
    return [
        (site.name, site.mask_output)
        if site.kind == "branch"
        else (site.name, site.num_channels, " ".join(site.producers), " ".join(c.module_path for c in site.consumers))
        for site in found.sites
    ]


EXPECTED = {
    "basic": [("1.conv1", 16, "1.conv1", "1.conv2"), ("1", "1.bn2"), ("2.conv1", 24, "2.conv1", "2.conv2"), ("2", "2.bn2")],
    "bottleneck": [
        ("0.0", 16, "0.0", "1.proj.0 1.a.0"),
        ("1.a.0", 8, "1.a.0", "1.b.0"),
        ("1", "1.c.1"),
        ("1.b.0", 8, "1.b.0", "1.c.0"),
        ("2.a.0", 8, "2.a.0", "2.b.0"),
        ("2", "2.c.1"),
        ("2.b.0", 8, "2.b.0", "2.c.0"),
    ],
    "vgg": [("0", 16, "0", "4"), ("4", 24, "4", "10"), ("10", 32, "10", "13")],
    "mbconv": [
        ("1.expand.0", 32, "1.expand.0", "1.project.0"),
        ("1", "1.project.1"),
        ("2.expand.0", 32, "2.expand.0", "2.project.0"),
        ("2.project.0", 16, "2.project.0", "3.fc"),
    ],
    "mbconv_se": [
        ("1.expand.0", 32, "1.expand.0 1.se.fc2", "1.se.fc1 1.project.0"),
        ("1", "1.project.1"),
        ("1.se.fc1", 8, "1.se.fc1", "1.se.fc2"),
        ("2.expand.0", 32, "2.expand.0 2.se.fc2", "2.se.fc1 2.project.0"),
        ("2.se.fc1", 8, "2.se.fc1", "2.se.fc2"),
        ("2.project.0", 16, "2.project.0", "3.fc"),
    ],
    "dense": [("1.conv1", 32, "1.conv1", "1.conv2"), ("2.conv1", 32, "2.conv1", "2.conv2")],
    "fire": [
        ("0.0", 16, "0.0", "1.squeeze"),
        ("1.squeeze", 8, "1.squeeze", "1.expand1x1 1.expand3x3"),
        ("3.squeeze", 8, "3.squeeze", "3.expand1x1 3.expand3x3"),
    ],
    "grouped": [
        ("0.0", 16, "0.0", "1.proj.0 1.a.0"),
        ("1.a.0", 32, "1.a.0", "1.b.0"),
        ("1", "1.c.1"),
        ("1.b.0", 32, "1.b.0", "1.c.0"),
        ("2.a.0", 32, "2.a.0", "2.b.0"),
        ("2", "2.c.1"),
        ("2.b.0", 32, "2.b.0 2.se.fc2", "2.se.fc1 2.c.0"),
    ],
    "convnext": [
        ("1", "1.pwconv2"),
        ("1.pwconv1", 64, "1.pwconv1", "1.pwconv2"),
        ("2", "2.pwconv2"),
        ("2.pwconv1", 64, "2.pwconv1", "2.pwconv2"),
    ],
    "same_padded": [("conv1", 16, "conv1", "conv2"), ("conv2", 24, "conv2", "head.fc")],
    "mlp": [("1", 64, "1", "3"), ("3", 32, "3", "5")],
    "attention": [
        ("0", "0.proj"),
        ("0.qkv", 16, "0.qkv", "0.proj"),
        ("0.fc2", "0.fc2"),
        ("0.fc1", 64, "0.fc1", "0.fc2"),
        ("1", "1.proj"),
        ("1.qkv", 16, "1.qkv", "1.proj"),
        ("1.fc2", "1.fc2"),
        ("1.fc1", 64, "1.fc1", "1.fc2"),
    ],
    "functional": [],
    "shared": [("first", 16, "first", "again"), ("again@0", 16, "again", "again"), ("again@1", 16, "again", "head.fc")],
    "tied": [],
    "generator": [("0", 16, "0", "4"), ("4", 12, "4", "6")],
    "causal": [("first", 16, "first", "second"), ("second", 24, "second", "fc")],
    "layers_again": [
        ("qkv@0", 16, "qkv", "proj"),
        ("fc1@0", 64, "fc1", "fc2"),
        ("qkv@1", 16, "qkv", "proj"),
        ("fc1@1", 64, "fc1", "fc2"),
    ],
    "in_place": [],
    "in_place_view": [],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_sites_are_those_an_expert_would_gate(name):
    assert summary(sites_of(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_layer_is_in_a_site_or_has_a_reason(name):
    graph, found = models.captured(name)[1], sites_of(name)
    listed = {path for site in found.sites if site.kind == "channels" for path in site.producers} | {item.name for item in found.ungated}
    for node in graph.nodes:
        depthwise = node.op == "conv2d" and node.arguments["groups"] == node.shape[1] > 1
        if node.op in ("conv2d", "linear") and not depthwise:
            assert (node.module_path or node.name) in listed, node
    assert all(item.reason for item in found.ungated)


class Tampering:
    """Masks what the consumers of a site read, and adds to the masked channels what nobody may see."""

    def __init__(self, model: nn.Module, site: Site, keep: torch.Tensor, noise: float):
        self.handles = []
        for consumer in site.consumers:
            module = model.get_submodule(consumer.module_path)
            dim = channel_dim(module)
            mask = keep.repeat_interleave(consumer.repeat)
            hook = at_call(consumer.call, lambda _, args, m=mask, d=dim: (args[0] * along(m, d, args[0].ndim),))
            self.handles.append(module.register_forward_pre_hook(hook))
        for path, call in zip(site.producers, site.calls, strict=True):
            module = model.get_submodule(path)
            dim = channel_dim(module)
            extra = (noise * (1 - keep)).repeat(len(site.first_rows[site.producers.index(path)]))
            self.handles.append(module.register_forward_hook(at_call(call, lambda _, args, y, e=extra, d=dim: y + along(e, d, y.ndim))))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def at_call(call: int | None, hook):
    """Returns `hook`, which acts at one call of its module only; None: at every one."""
    calls = itertools.count()
    return lambda *args: hook(*args) if next(calls) == call or call is None else None


def channel_dim(module: nn.Module) -> int:
    return 1 if isinstance(module, _ConvNd) else -1


def along(values: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    return values.view([-1 if i == dim % rank else 1 for i in range(rank)])


@pytest.mark.parametrize("name", models.GATED)
def test_channels_that_consumers_do_not_read_change_nothing(name):
    """What the engine does to a site: it leaves out rows of all producers. Nothing may tell, once the consumers leave them out too."""
    model = models.build(name)
    args = models.example(name, 2)
    for site in sites_of(name).sites:
        if site.kind == "channels":
            keep = (torch.arange(site.num_channels) // site.group_size % 3 > 0).float()
            with torch.no_grad():
                with Tampering(model, site, keep, noise=0.0):
                    want = model(*args)
                with Tampering(model, site, keep, noise=3.0):
                    assert_close(model(*args), want, context=site.name)
                assert (want - model(*args)).abs().max() > 1e-6, f"{site.name} has no effect on the result"


@pytest.mark.parametrize("name", models.GATED)
def test_a_skipped_branch_leaves_the_other_operand(name):
    model, graph = models.build(name), models.captured(name)[1]
    args = models.example(name, 2)
    nodes = {node.name: node for node in graph.nodes}
    for site in sites_of(name).sites:
        if site.kind == "branch":
            add = nodes[site.add_node]
            other = next(value for value in add.inputs if value.name not in site.nodes)
            module = model.get_submodule(site.mask_output)
            handle = module.register_forward_hook(lambda _, args, y: (y[0] * 0, *y[1:]) if isinstance(y, tuple) else y * 0)
            with torch.no_grad():
                assert_close(run_graph(graph, args, {add.name: other.name}), model(*args), factor=10, context=site.name)
            handle.remove()
            outside = {used.name for inner in site.nodes for used in nodes[inner].inputs if used.varies and used.shape} - site.nodes
            assert outside == {site.gate_input}, site.name


@pytest.mark.parametrize("name", models.GATED)
def test_gate_input_comes_before_the_site(name):
    graph = models.captured(name)[1]
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    nodes = {node.name: node for node in graph.nodes}
    for site in sites_of(name).sites:
        assert order[site.gate_input] < min(order[inner] for inner in site.nodes)
        assert nodes[site.gate_input].shape[site.gate_dim] == site.gate_channels
        assert site.num_groups == site.num_channels // site.group_size


def test_macs_are_counted_per_sample():
    found = sites_of("vgg")
    assert found.macs == 16 * 27 * 256 + 24 * 144 * 64 + 216 * 32 + 32 * 10
    first, second, third = found.sites
    assert first.macs == 16 * 27 * 256 + 24 * 144 * 64
    assert second.macs == 24 * 144 * 64 + 216 * 32 and second.consumers[0].repeat == 9
    assert third.macs_share == pytest.approx((216 * 32 + 320) / found.macs)


def test_macs_of_depthwise_grouped_and_attention():
    se = next(site for site in sites_of("mbconv_se").sites if site.name == "1.expand.0")
    assert se.macs == 64 * (8 * 32 + 32 * 9 + 32 * 8) + 2 * 32 * 8
    macs = sites_of("attention").node_macs
    attention = next(count for name, count in macs.items() if name.startswith("scaled_dot_product"))
    assert attention == 2 * 7 * 7 * 16
    grouped = next(site for site in sites_of("grouped").sites if site.name == "1.a.0")
    assert grouped.macs == 64 * (16 * 32 + 32 * 8 * 9)


def test_batch_of_the_example_does_not_change_macs():
    assert find_sites(capture(models.build("attention"), models.example("attention", 5))).macs == sites_of("attention").macs


@pytest.mark.parametrize(
    ("name", "place", "reason"),
    [
        ("basic", "1.conv2", "residual stream"),
        ("basic", "3.fc", "output of the model"),
        ("fire", "1.expand1x1", "concatenated"),
        ("convnext", "0", "normalises over its channels"),
        ("grouped_queries", "0.key", "may mix its channels"),
        ("channel_shuffle", "0", "splits, merges or moves"),
        ("functional", "conv2d", "functional conv2d"),
        ("tied", "a", "shares its weight"),
        ("generator", "6", "transposed and in groups"),
    ],
    ids=lambda value: value.replace(" ", "_"),
)
def test_reasons(name, place, reason):
    assert any(reason in item.reason for item in sites_of(name).ungated if item.name == place)


def net(forward, **modules) -> nn.Module:
    """Returns a module with these sub-modules whose forward is `forward(module, x)`."""

    class Net(nn.Module):
        def forward(self, x):
            return forward(self, x)

    model = Net()
    for name, module in modules.items():
        model.add_module(name, module)
    return model.eval()


def conv(a: int, b: int, **options) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1, **options)


@pytest.mark.parametrize(
    ("model", "gated"),
    [
        (net(lambda m, x: m.b(F.softmax(m.a(x), 1)), a=conv(3, 8), b=conv(8, 4)), False),
        (net(lambda m, x: m.b(F.softmax(m.a(x), 2)), a=conv(3, 8), b=conv(8, 4)), False),
        (net(lambda m, x: m.b(m.a(x).flip(1)), a=conv(3, 8), b=conv(8, 4)), False),
        (net(lambda m, x: m.b(m.a(x)[:, 1:]), a=conv(3, 8), b=conv(7, 4)), False),
        (net(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 8), b=conv(2, 4)), False),
        (net(lambda m, x: m.b(m.a(x).flatten(2).transpose(1, 2)), a=conv(3, 8), b=nn.Linear(8, 4)), True),
        (net(lambda m, x: m.b(m.a(x).flatten(2)), a=conv(3, 8), b=nn.Linear(64, 4)), False),
        (net(lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).flatten(2)), a=conv(3, 8), b=nn.Linear(64, 4)), False),
        (net(lambda m, x: m.b(m.a(x) * F.adaptive_avg_pool2d(m.c(x), (8, 1))), a=conv(3, 8), b=conv(8, 4), c=conv(3, 8)), False),
        (net(lambda m, x: m.b(m.a(x).mean((1, 2))), a=conv(3, 8), b=nn.Linear(8, 4)), False),
        (net(lambda m, x: m.b(m.a(x) * torch.arange(8.0)[:, None, None]), a=conv(3, 8), b=conv(8, 4)), True),
        (net(lambda m, x: m.b(2 - m.a(x) ** 2), a=conv(3, 8), b=conv(8, 4)), True),
        (net(lambda m, x: m.b(m.a(x) * x.mean(1, keepdim=True)), a=conv(3, 8), b=conv(8, 4)), True),
        (net(lambda m, x: m.b(m.a(x) * x.mean((1, 2, 3))[:, None, None, None]), a=conv(3, 8), b=conv(8, 4)), True),
        (net(lambda m, x: m.b(m.a(x) * m.c(x).sigmoid()), a=conv(3, 8), b=conv(8, 4), c=conv(3, 1)), True),
        (net(lambda m, x: m.b(m.a(x) + m.c(x)), a=conv(3, 8), b=conv(8, 4), c=conv(3, 8)), False),
        (net(lambda m, x: m.b(F.pad(m.a(x), (1, 1, 0, 0), value=1.0)), a=conv(3, 8), b=conv(8, 4)), False),
        (net(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, 1))), a=conv(3, 8), b=conv(10, 4)), False),
        (net(lambda m, x: m.b(m.a(x)), a=conv(3, 8, padding_mode="circular"), b=conv(8, 4, padding_mode="reflect")), False),
        (net(lambda m, x: m.b(F.group_norm(m.a(x), 2)), a=conv(3, 8), b=conv(8, 4)), False),
        (net(lambda m, x: m.b(m.a(x)), a=nn.utils.parametrizations.weight_norm(conv(3, 8)), b=conv(8, 4)), False),
        (net(lambda m, x: (m.b(m.a(x)), m.c(x)), a=conv(3, 8), b=conv(8, 4), c=nn.ConvTranspose2d(3, 4, 3)), True),
        (net(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=nn.ConvTranspose2d(8, 4, 3)), True),
        (net(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=nn.ConvTranspose2d(8, 4, 3, groups=2)), False),
        (net(lambda m, x: m.b(m.a(x)), a=nn.ConvTranspose2d(3, 8, 2, 2, groups=1), b=conv(8, 4)), True),
        (net(lambda m, x: m.b(m.a(x)[:, :, 1:]), a=conv(3, 8), b=conv(8, 4)), True),
        (net(lambda m, x: m.b(m.a(x.flatten(2)).relu()), a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 4, 1)), True),
    ],
    ids=[
        "softmax_channels", "softmax_rows", "flip", "slice", "pixel_shuffle", "tokens", "linear_over_positions", "channels_fastest",
        "row_scale", "mean_over_channels",
        "constant_per_channel", "square_and_reverse", "spatial_map_of_input", "scalar_per_sample", "spatial_map_of_conv", "parallel_sum",
        "pad_with_ones", "pad_channels", "circular", "group_norm", "weight_norm", "second_output",
        "transposed", "transposed_groups", "transposed_producer", "slice_rows", "conv1d",
    ],
)  # fmt: skip
def test_one_operation_between_two_layers(model, gated):
    sites = find_sites(capture(model, torch.rand(2, 3, 8, 8)))
    assert ("a" in [site.name for site in sites.sites if site.kind == "channels"]) == gated, sites.ungated


@pytest.mark.parametrize(
    ("model", "branches"),
    [
        (net(lambda m, x: m.b(m.c(x) + m.a(x)), a=conv(3, 4), b=conv(4, 4), c=nn.Conv2d(3, 4, 1)), ["a"]),
        (net(lambda m, x: x + 0.5 * m.a(x), a=conv(3, 3)), ["a"]),
        (net(lambda m, x: x + m.a(x).relu(), a=conv(3, 3)), []),
        (net(lambda m, x: x + torch.relu(m.b(m.a(x))) * 0.1, a=conv(3, 3), b=nn.BatchNorm2d(3)), []),
        (net(lambda m, x: torch.add(x, m.a(x), alpha=2), a=conv(3, 3)), []),
        (net(lambda m, x: x + m.a(x) * m.b(x), a=conv(3, 3), b=conv(3, 3)), []),
        (net(lambda m, x: x + m.a(m.a(x)), a=conv(3, 3)), []),
        (net(lambda m, x: (y := x.relu()) + m.a(y * x.mean(1, keepdim=True)), a=conv(3, 3)), ["a"]),
        (net(lambda m, x: (y := m.a(x), x + y), a=conv(3, 3)), []),
        (net(lambda m, x: m.a(x.relu()) + m.b(x.neg()), a=conv(3, 3), b=conv(3, 3)), ["a"]),
        (net(lambda m, x: x + m.b(m.a(x)), a=conv(3, 3), b=nn.Sequential(conv(3, 3), nn.ReLU(True), nn.Dropout())), ["b.1"]),
    ],
    ids=[
        "two_convs", "scaled", "functional_relu", "relu_then_scaled", "alpha", "product", "called_twice", "second_source",
        "returned", "own_sources", "module_output",
    ],
)  # fmt: skip
def test_branches(model, branches):
    sites = find_sites(capture(model, torch.rand(2, 3, 8, 8)))
    assert [site.mask_output for site in sites.sites if site.kind == "branch"] == branches


def test_small_sites_are_left_alone():
    model = nn.Sequential(conv(3, 64), conv(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 2)).eval()
    found = find_sites(capture(model, torch.rand(1, 3, 16, 16)))
    assert [site.name for site in found.sites] == ["0", "1"]
    assert any(item.name == "4" and "too small" in item.reason for item in found.ungated)
    assert all(site.macs_share >= MIN_MACS_SHARE for site in found.sites)


def test_include_and_exclude():
    graph = models.captured("mbconv")[1]
    names = [site.name for site in find_sites(graph, include=("*.expand.*", "1"), exclude=("2.*",)).sites]
    assert names == ["1.expand.0", "1"]
    left_out = {item.name for item in find_sites(graph, exclude=("1",)).ungated if "left out" in item.reason}
    assert left_out == {"1"}
    assert find_sites(graph, exclude=("*",)).sites == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ("1.expnd.0",)}, r"'1\.expnd\.0' matches no site.*'1\.expand\.0'"),
        ({"exclude": ("layer9*",)}, r"'layer9\*' matches no site"),
        ({"include": ("3.fc",)}, "cannot be gated"),
        ({"group_size": 0}, r"whole number >= 1, got 0"),
        ({"group_size": 2.0}, r"whole number >= 1, got 2\.0"),
        (
            {"group_size": 12},
            r"Site '1\.expand\.0' has 32 output channels, not a multiple of group_size=12; pass group_size=4 or exclude it",
        ),
    ],
    ids=["misspelt", "nothing", "ungated", "zero", "float", "not_a_divisor"],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        find_sites(models.captured("mbconv")[1], **options)


def test_group_size():
    site = find_sites(models.captured("mbconv")[1], group_size=8).sites[0]
    assert (site.num_channels, site.group_size, site.num_groups) == (32, 8, 4)


@pytest.mark.parametrize(("name", "channels", "branches"), [("resnet18", 8, 8), ("mobilenet_v3_small", 16, 6), ("squeezenet1_1", 9, 0)])
def test_torchvision(name, channels, branches):
    model, x = torchvision_model(name), torch.rand(1, 3, 224, 224)
    found = find_sites(capture(model, x))
    kinds = [site.kind for site in found.sites]
    assert (kinds.count("channels"), kinds.count("branch")) == (channels, branches)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert found.macs * 2 == counter.get_total_flops()
