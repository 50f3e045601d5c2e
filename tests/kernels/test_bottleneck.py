"""Expand, depthwise and project as one step against torch, for every instruction set, sizes around tiles and bands, and active lists."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LIST_KINDS, active_list, assert_close

from dynprune.runtime import _C

RELU6, SILU = (1, 0.0, 6.0), (5, 0.0, 0.0)
# inputs, inner channels, outputs, height, width, kernel, stride, padding
SHAPES = [
    (3, 13, 5, 9, 10, 3, 1, 1),
    (16, 24, 8, 30, 31, 3, 2, 1),
    (8, 48, 16, 14, 14, 5, 1, 2),
    (5, 30, 7, 7, 7, 3, 1, 1),
    (4, 12, 6, 28, 27, 5, 2, 2),
    (2, 9, 3, 17, 40, 7, 1, 3),
    (3, 8, 4, 12, 13, 2, 1, 0),
    (2, 6, 2, 1, 5, 3, 1, 1),
    (24, 72, 24, 56, 56, 3, 1, 1),
]
GATED = (11, 40, 9, 14, 13, 3, 1, 1)
PARTS = ("expand depthwise project", "expand depthwise", "depthwise project")


def shape_id(shape) -> str:
    return "i{}c{}o{}h{}w{}k{}s{}p{}".format(*shape)


def activated(x, kind):
    return x if kind is None else F.silu(x) if kind == SILU else x.clamp(*kind[1:])


class Block:
    """Random weights of the parts, as steps of a plan and in torch (float64).

    With `bf16` the 1x1 parts run in bfloat16 and all numbers are small and whole, so that nothing is lost by rounding them.
    """

    def __init__(self, shape, parts: str = PARTS[0], *, inner=RELU6, outer=None, residual: bool = False, bf16: bool = False, seed: int = 0):
        self.shape, self.parts, self.inner, self.outer, self.residual, self.bf16 = shape, parts.split(), inner, outer, residual, bf16
        inputs, channels, outputs, height, width, kernel, stride, padding = shape
        self.out_size = [(n + 2 * padding - kernel) // stride + 1 for n in (height, width)]
        self.rng = np.random.default_rng(seed)
        self.first = inputs if "expand" in self.parts else channels
        self.last = outputs if "project" in self.parts else channels
        self.expand = (self.random(channels, inputs, spread=inputs**-0.5), self.random(channels))
        self.depthwise = (self.random(channels, kernel * kernel, spread=1 / kernel), self.random(channels))
        self.project = (self.random(outputs, channels, spread=channels**-0.5), self.random(outputs))

    def random(self, *sizes: int, spread: float = 1.0):
        if self.bf16:
            return self.rng.integers(-2, 3, sizes).astype(np.float32)
        return self.rng.standard_normal(sizes, dtype=np.float32) * np.float32(spread)

    def spec(self, *, fused: bool, sites=(), in_site=-1, site=-1, out_site=-1, branches=()) -> dict:
        inputs, channels, _, height, width, kernel, stride, padding = self.shape
        plane, out_plane = height * width, self.out_size[0] * self.out_size[1]
        buffers = [("input", self.first * plane, 0), ("arena", channels * plane, 0), ("arena", channels * out_plane, channels * plane)]
        buffers += [("output", self.last * out_plane, 0)] + [("input", self.last * out_plane, 0)] * self.residual
        values = {
            "expand": (0, 0, inputs, plane, plane),
            "depthwise": (1 if "expand" in self.parts else 0, 0, channels, plane, plane),
            "project": (2, 0, channels, out_plane, out_plane),
            "out": (3, 0, self.last, out_plane, out_plane),
        }
        steps = []
        for part, after in zip(self.parts, [*self.parts[1:], "out"], strict=True):
            weight, bias = getattr(self, part)
            step = {"op": "depthwise" if part == "depthwise" else "conv", "name": part, "inputs": [values[part]], "output": values[after]}
            step |= {"constants": {"weight": weight, "bias": bias}, "branches": list(branches)}
            step |= {"in_site": in_site if part == "expand" else site, "out_site": out_site if part == "project" else site}
            sizes = [channels, height, width] if part == "depthwise" else [inputs, height, width] if part == "expand" else None
            step["ints"] = {
                "in_size": sizes or [channels, *self.out_size],
                "out_size": [channels, height, width] if part == "expand" else [weight.shape[0], *self.out_size],
                "kernel": [kernel] * 2 if part == "depthwise" else [1, 1],
                "stride": [stride] * 2 if part == "depthwise" else [1, 1],
                "padding": [padding] * 4 if part == "depthwise" else [0] * 4,
            }
            if self.bf16 and part != "depthwise":
                step["ints"]["bf16"] = [1]
            activation = self.outer if part == "project" else self.inner
            if activation is not None:
                step["ints"]["activation"], step["floats"] = [activation[0]], {"activation": list(activation[1:])}
            steps.append(step)
        if self.residual:
            steps[-1]["inputs"].append((4, 0, self.last, out_plane, out_plane))
        if fused:
            steps[-1]["ints"]["fused"] = [len(steps) - 1]
        return {"arena_size": channels * (plane + out_plane), "buffers": buffers, "sites": list(sites), "steps": steps}

    def torch(self, x, shift=0.0):
        """The reference; `x` (batch, channels, height, width) has zeros where inputs are inactive, for which `shift` is added."""
        y = torch.from_numpy(x).double()
        if "expand" in self.parts:
            weight, bias = (torch.from_numpy(a).double() for a in self.expand)
            y = activated(F.conv2d(y, weight[:, :, None, None], bias) + shift, self.inner)
        kernel, stride, padding = self.shape[5:]
        weight, bias = (torch.from_numpy(a).double() for a in self.depthwise)
        y = F.conv2d(y, weight.view(-1, 1, kernel, kernel), bias, stride=stride, padding=padding, groups=len(weight))
        return activated(y, self.inner)

    def projected(self, y, residual=None):
        weight, bias = (torch.from_numpy(a).double() for a in self.project)
        y = F.conv2d(y, weight[:, :, None, None], bias)
        return activated(y if residual is None else y + torch.from_numpy(residual).double(), self.outer)


def run(isa, block, spec, arrays, *, active=(), num_threads=1, compensation=None, of_inputs=None, must_fuse=True):
    """Runs a plan on NaN-filled memory and returns its output (batch, rows, positions)."""
    plan = _C.Plan(spec, isa, num_threads)
    if must_fuse:
        assert plan.chunks()[:-1] == [0] * (len(block.parts) - 1), "the steps were not run as one"
    if compensation is not None:
        plan.set_compensation(len(block.parts) - 1, compensation)
    if of_inputs is not None:
        plan.set_compensation(0, of_inputs)
    batch = len(arrays[0])
    workspace = plan.acquire(batch)
    workspace.begin_given([[[int(i) for i in chosen] for chosen in site] for site in active])
    output = np.full((batch, block.last, block.out_size[0] * block.out_size[1]), np.nan, np.float32)
    for buffer, array in ((0, arrays[0]), (3, output), *((4, array) for array in arrays[1:])):
        workspace.bind(buffer, array.ctypes.data, array[0].size, array)
    workspace.run(0, len(block.parts), num_threads)
    plan.release(workspace)
    return output


def check_whole(isa, block) -> None:
    x = block.random(2, block.first, *block.shape[3:5])
    want = block.torch(x)
    if "project" in block.parts:
        want = block.projected(want)
    for num_threads in (1, 2, 5):
        got = run(isa, block, block.spec(fused=True), [x], num_threads=num_threads, must_fuse=num_threads == 1)
        assert_close(got, want.flatten(2), context=f"{num_threads} threads")


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("parts", PARTS)
def test_equals_torch(isa, shape, parts) -> None:
    check_whole(isa, Block(shape, parts))


@pytest.mark.parametrize(("inner", "outer", "residual"), list(itertools.product((RELU6, SILU, None), (None, SILU), (False, True))))
def test_activations_and_residual(isa, inner, outer, residual) -> None:
    block = Block(SHAPES[0], inner=inner, outer=outer, residual=residual)
    x = block.rng.standard_normal((1, block.first, 9, 10), dtype=np.float32)
    extra = block.rng.standard_normal((1, block.last, 9, 10), dtype=np.float32)
    got = run(isa, block, block.spec(fused=True), [x, extra][: 1 + residual])
    assert_close(got, block.projected(block.torch(x), extra if residual else None).flatten(2))


def check_gated(isa, block, kind) -> None:
    """Inputs, the 40 inner channels of a 14x13 plane, and outputs follow lists of their own, each sample another one."""
    sizes, batch = (block.first, 40, block.last), 3
    lists = [[active_list(kind, size, block.rng) for _ in range(batch)] for size in sizes]
    whole = block.random(batch, block.first, 14, 13)
    if "expand" not in block.parts:
        lists[0] = lists[1]
    if "project" not in block.parts:
        lists[2] = lists[1]
    x, masked = np.full_like(whole, np.nan), np.zeros_like(whole)
    for sample, active in enumerate(lists[0]):
        x[sample, : len(active)] = whole[sample, active]
        masked[sample, active] = whole[sample, active]
    of_inputs, shift = None, 0.0
    if "expand" in block.parts:
        of_inputs = block.random(40, block.first)
        missing = [np.delete(of_inputs.astype(np.float64), active, 1).sum(1) for active in lists[0]]
        shift = torch.from_numpy(np.stack(missing))[:, :, None, None]
    want = block.torch(masked, shift)
    for sample, active in enumerate(lists[1]):
        want[sample, np.setdiff1d(np.arange(40), active)] = 0
    compensation = None
    if "project" in block.parts:
        compensation = block.random(block.last, 40)
        want = block.projected(want)
        for sample, active in enumerate(lists[1]):
            inactive = np.setdiff1d(np.arange(40), active)
            want[sample] += torch.from_numpy(compensation[:, inactive].astype(np.float64).sum(1))[:, None, None]
    sites = [("channels", size, 1) for size in sizes]
    for num_threads in (1, 2):
        spec = block.spec(fused=True, sites=sites, in_site=0, site=1, out_site=2)
        options = {"compensation": compensation, "of_inputs": of_inputs, "must_fuse": num_threads == 1}
        got = run(isa, block, spec, [x], active=lists, num_threads=num_threads, **options)
        for sample, active in enumerate(lists[2]):
            assert_close(got[sample, : len(active)], want[sample, active].flatten(1), context=f"sample {sample}")
            assert np.isnan(got[sample, len(active) :]).all(), "rows that do not run were written"


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize("parts", PARTS)
def test_gated_channels(isa, kind, parts) -> None:
    check_gated(isa, Block(GATED, parts), kind)


def test_a_branch_that_is_off_hands_its_input_on(isa) -> None:
    block = Block(SHAPES[0], outer=RELU6, residual=True)
    x = block.rng.standard_normal((2, block.first, 9, 10), dtype=np.float32)
    extra = block.rng.standard_normal((2, block.last, 9, 10), dtype=np.float32)
    spec = block.spec(fused=True, sites=[("branch", 1, 1)], branches=[0])
    got = run(isa, block, spec, [x, extra], active=[[[0], []]])
    want = block.projected(block.torch(x), extra)
    want[1] = torch.from_numpy(extra[1]).clamp(0, 6)
    assert_close(got, want.flatten(2))


def test_bands_of_many_threads_change_no_bit(isa) -> None:
    block = Block((24, 72, 24, 56, 56, 3, 2, 1))
    x = block.rng.standard_normal((1, 24, 56, 56), dtype=np.float32)
    results = [run(isa, block, block.spec(fused=True), [x], num_threads=n, must_fuse=False) for n in (1, 2, 3)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def _without_first(spec):
    del spec["steps"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec["steps"][2]["ints"].update(fused=[3]), "'fused' must be 1 or 2 steps"),
        (lambda spec: spec["steps"][2]["ints"].update(fused=[]), "'fused' must be 1 or 2 steps"),
        (lambda spec: spec["steps"][0]["ints"].update(fused=[1]), "'fused' must be 1 or 2 steps"),
        (lambda spec: spec["steps"][1]["ints"].update(fused=[1]), "fused with more than one other"),
        (_without_first, "'fused' must be 1 or 2 steps"),
        (lambda spec: spec["steps"][0].update(op="depthwise"), "'fused' must count the steps before it"),
        (lambda spec: spec["steps"][0]["ints"].update(stride=[2, 2]), "only a 1x1 convolution of stride 1"),
        (lambda spec: spec["steps"][1]["inputs"].__setitem__(0, (1, 1, 13, 89, 89)), "each of fused steps must read what the one before"),
        (lambda spec: spec["steps"][0].update(branches=[0]), "under the same sites and branches"),
        (lambda spec: spec["steps"][1]["inputs"].append((0, 0, 3, 90, 90)), "only the last of fused steps may have a residual"),
    ],
)
def test_refuses_steps_that_do_not_fit(change, message) -> None:
    spec = Block(SHAPES[0]).spec(fused=True, sites=[("branch", 1, 1)])
    change(spec)
    with pytest.raises(ValueError, match=message):
        _C.Plan(spec, "scalar", 1)
