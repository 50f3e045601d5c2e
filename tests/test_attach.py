"""The reference semantics of gates on the user's own modules."""

from __future__ import annotations

import threading

import models
import pytest
import torch
from helpers import assert_close
from torch import nn
from torch.nn import functional as F

from dynprune.errors import InputError
from dynprune.gates.attach import Attachment, Masking, make_gate
from dynprune.gates.heads import gate_key
from dynprune.gates.hooks import Visitor, pool
from dynprune.graph.capture import Graph, capture
from dynprune.graph.sites import find_sites


def attach(model: nn.Module, example: tuple) -> Attachment:
    return attach_to(model, capture(model, example))


def attach_to(model: nn.Module, graph: Graph) -> Attachment:
    sites = find_sites(graph).sites
    gates = nn.ModuleDict({gate_key(site.name): make_gate(model, site) for site in sites}).eval()
    return Attachment(model, sites, gates, graph)


def attached(name: str) -> tuple[Attachment, tuple]:
    return attach_to(*models.captured(name)), models.example(name, batch=3, seed=2)


def site_of(attachment: Attachment, kind: str):
    return next(site for site in attachment.sites if site.kind == kind)


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class TwoConvs(nn.Module):
    """A channel space between two convolutions without padding, so that compensation is exact everywhere."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.second(F.relu(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize("name", models.GATED)
def test_level_zero_is_the_model_itself(name):
    attachment, inputs = attached(name)
    with torch.no_grad():
        output, masks = attachment.run(inputs, level=0.0)
        assert output.equal(attachment.model(*inputs))
    assert masks == {}


@pytest.mark.parametrize("name", models.GATED)
def test_all_groups_active_is_the_model_itself(name):
    attachment, inputs = attached(name)
    everything = {site.name: [range(site.num_groups)] * 3 for site in attachment.sites}
    with torch.no_grad():
        output, masks = attachment.run(inputs, level=1.0, active=everything)
        assert_close(output, attachment.model(*inputs))
    assert set(masks) == set(everything)
    assert attachment.ungated == ()


@pytest.mark.parametrize("name", models.GATED)
def test_a_gated_call_masks_every_site_and_changes_the_output(name):
    attachment, inputs = attached(name)
    with torch.no_grad():
        output, masks = attachment.run(inputs, level=1.0)
        assert not output.allclose(attachment.model(*inputs))
    for site in attachment.sites:
        assert masks[site.name].shape == (3, site.num_groups)
        assert masks[site.name].unique().tolist() in ([0, 1], [1.0])


def test_inactive_channels_are_zeros_at_the_consumer():
    model = TwoConvs().eval()
    attachment = attach(model, (torch.rand(1, 4, 9, 9),))
    x = torch.rand(2, 4, 9, 9)
    with torch.no_grad():
        got, _ = attachment.run((x,), level=1.0, active={"first": [[0, 3], []]})
        hidden = F.relu(model.first(x))
        hidden[0, [1, 2, 4, 5, 6, 7]] = 0
        hidden[1] = 0
        assert_close(got, model.head(model.second(hidden).mean((2, 3))))


def test_compensation_puts_the_mean_in_place_of_an_inactive_channel():
    model = TwoConvs().eval()
    attachment = attach(model, (torch.rand(1, 4, 9, 9),))
    gate = attachment.gate("first")
    gate.channel_means[0] = torch.randn(8)
    gate.compensated[0] = True
    x = torch.rand(2, 4, 9, 9)
    with torch.no_grad():
        got, _ = attachment.run((x,), level=1.0, active={"first": [[0, 3], [1, 2, 3, 4, 5, 6, 7]]})
        hidden = F.relu(model.first(x))
        for sample, inactive in enumerate(([1, 2, 4, 5, 6, 7], [0])):
            hidden[sample, inactive] = gate.channel_means[0, inactive, None, None]
        assert_close(got, model.head(model.second(hidden).mean((2, 3))))


def test_flattened_channels_mask_all_their_features():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    attachment = attach(model, (torch.rand(1, 3, 8, 8),))
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        got, _ = attachment.run((x,), level=1.0, active={"0": [[2], [0, 7]]})
        hidden = model[1](model[0](x))
        hidden[0, [0, 1, 3, 4, 5, 6, 7]] = 0
        hidden[1, 1:7] = 0
        assert_close(got, model[3](model[2](hidden)))


def test_a_skipped_branch_leaves_its_shortcut():
    block = models.BasicBlock(16, 16)
    model = nn.Sequential(models.stem(16), block, models.Head(16)).eval()
    attachment = attach(model, (torch.rand(1, 3, 16, 16),))
    site = site_of(attachment, "branch")
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        got, masks = attachment.run((x,), level=1.0, active={site.name: [[], [0]]})
        hidden = model[0](x)
        assert_close(got, torch.cat([model[2](F.relu(hidden[:1])), model[2](block(hidden[1:]))]))
    assert masks[site.name].flatten().tolist() == [0, 1]


def test_a_gate_sees_the_mean_with_zeros_for_inactive_channels():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()
    attachment = attach(model, (torch.rand(1, 3, 12, 12),))
    seen = {}

    def see(site, x, channel_dim):
        seen[site.name] = pool(x, channel_dim)
        return torch.tensor([[1.0] * 2 + [0.0] * 6]) if site.name == "0" else None

    x = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        attachment.visit(Masking(attachment, see), (x,))
        assert_close(seen["0"], x.mean((2, 3)))
        expected = model[1](model[0](x)).mean((2, 3))
        expected[:, 2:] = 0
        assert_close(seen["2"], expected)


def test_tokens_are_pooled_over_positions_and_channels_are_last():
    attachment, inputs = attached("attention")
    shapes = {}

    class Look(Visitor):
        def gate_input(self, site, x, channel_dim):
            shapes[site.name] = tuple(pool(x, channel_dim).shape)

    with torch.no_grad():
        attachment.visit(Look(), inputs)
    assert shapes == {site.name: (3, site.gate_channels) for site in attachment.sites}


class Preactivated(nn.Module):
    """The branch starts with a function, so its input is seen only where it enters the block."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.two(F.relu(self.one(F.relu(x))))


def test_the_input_of_a_functional_branch_is_seen_at_its_block():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Preactivated(), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()
    attachment = attach(model, (torch.rand(1, 3, 8, 8),))
    x, seen = torch.rand(2, 3, 8, 8), {}

    class Look(Visitor):
        def gate_input(self, site, x, channel_dim):
            seen[site.kind] = pool(x, channel_dim)

    with torch.no_grad():
        attachment.visit(Look(), (x,))
        assert_close(seen["branch"], model[0](x).mean((2, 3)))
        assert_close(seen["channels"], F.relu(model[0](x)).mean((2, 3)))


class TwoBranches(nn.Module):
    """The input of the second branch is a sum inside forward that no module takes or returns."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(F.relu(x))
        x = x + self.b(F.relu(x))
        return self.head(x)


def test_a_branch_whose_input_no_module_shows_is_left_out_with_the_reason():
    attachment = attach(TwoBranches().eval(), (torch.rand(1, 3, 8, 8),))
    assert [site.mask_output for site in attachment.sites if site.kind == "branch"] == ["a"]
    assert len(attachment.ungated) == 1
    assert "only input" in attachment.ungated[0].reason


@pytest.mark.parametrize("name", ["basic", "attention"])
def test_no_hook_is_left_behind(name):
    attachment, inputs = attached(name)
    attachment.run(inputs, level=0.5)
    assert num_hooks(attachment.model) == 0
    with pytest.raises(RuntimeError):
        attachment.run((torch.rand(2, 1, 1),), level=0.5)
    assert num_hooks(attachment.model) == 0
    attachment.run(inputs, level=0.5)


def test_training_gives_gradients_to_gates_and_weights():
    attachment, inputs = attach(models.build("basic"), models.example("basic")), models.example("basic", batch=3)
    attachment.model.train()
    attachment.gates.train()
    output, masks = attachment.run(inputs, level=0.5)
    output.square().mean().backward()
    assert all(mask.requires_grad for mask in masks.values())
    for site in attachment.sites:
        assert attachment.gate(site.name).bias.grad.abs().sum() > 0, site.name
    weights = [p.grad for name, p in attachment.model.named_parameters() if name.endswith("weight")]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in weights)


def test_keyword_arguments_reach_the_model():
    attachment, inputs = attached("basic")
    with torch.no_grad():
        output, _ = attachment.run((), {"input": inputs[0]}, level=0.5)
        assert output.equal(attachment.run(inputs, level=0.5)[0])


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[0]], "one list per sample, 3 here, got 1"),
        ([[0], [1, 1], [2]], "strictly ascending"),
        ([[0], [3, 1], [2]], "strictly ascending"),
        ([[0], [-1], [2]], "strictly ascending"),
        ([[0], [1], [10_000]], "strictly ascending"),
    ],
    ids=["batch", "twice", "order", "negative", "range"],
)
def test_lists_that_do_not_fit_are_refused(lists, message):
    attachment, inputs = attached("basic")
    with pytest.raises(InputError, match=message):
        attachment.run(inputs, level=1.0, active={site_of(attachment, "channels").name: lists})


def test_an_unknown_site_is_refused_with_a_near_name():
    attachment, inputs = attached("basic")
    name = site_of(attachment, "channels").name
    with pytest.raises(InputError, match=f"did you mean one of .*{name}"):
        attachment.run(inputs, level=1.0, active={name + "x": [[0]] * 3})


def test_two_threads_get_their_own_results():
    attachment, _ = attached("basic")
    inputs = [models.example("basic", batch=2, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [attachment.run(x, level=0.4)[0] for x in inputs]
    got: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        with torch.no_grad():
            got[i] = attachment.run(inputs[i], level=0.4)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert_close(got[i], expected[i], context=f"thread {i}")
