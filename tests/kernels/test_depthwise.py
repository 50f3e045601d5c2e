"""Depthwise convolution against torch, for every instruction set, ragged shapes and active lists."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LIST_KINDS, assert_close
from single_step import active_lists, compact, run_step

from dynprune.runtime import _C

# channels, height, width, kernel, stride, padding, dilation
SHAPES = [
    (3, 1, 1, 3, 1, 1, 1),
    (5, 7, 7, 3, 1, 1, 1),
    (4, 7, 7, 5, 1, 2, 1),
    (4, 7, 7, 7, 1, 3, 1),
    (3, 14, 14, 3, 1, 1, 1),
    (3, 14, 15, 3, 2, 1, 1),
    (2, 15, 14, 5, 2, 2, 1),
    (2, 13, 17, 7, 2, 3, 1),
    (2, 9, 16, 3, 1, 1, 1),
    (2, 6, 33, 3, 1, 0, 1),
    (2, 10, 31, 3, 1, 2, 2),
    (2, 11, 40, 5, 3, 2, 1),
    (2, 12, 70, 2, 1, 0, 1),
    (2, 16, 33, 4, 4, 0, 3),
    (1, 112, 113, 3, 1, 1, 1),
    (2, 113, 112, 3, 2, 1, 1),
]


def shape_id(shape):
    channels, height, width, kernel, stride, padding, dilation = shape
    return f"c{channels}h{height}w{width}k{kernel}s{stride}p{padding}d{dilation}"


def depthwise(isa, x, weight, bias, shape, *, lists=None, activation=None):
    channels, height, width, kernel, stride, padding, dilation = shape
    out_h, out_w = ((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for size in (height, width))
    ints = {
        "in_size": [channels, height, width],
        "out_size": [channels, out_h, out_w],
        "kernel": [kernel, kernel],
        "stride": [stride, stride],
        "padding": [padding] * 4,
        "dilation": [dilation, dilation],
    }
    floats = {}
    if activation is not None:
        ints["activation"] = [activation[0]]
        floats["activation"] = list(activation[1:])
    rows = compact(x.reshape(*x.shape[:2], -1), lists)
    constants = {"weight": weight.reshape(channels, -1), "bias": bias}
    got = run_step(
        isa,
        "depthwise",
        [rows],
        (channels, out_h * out_w),
        lists=lists,
        ints=ints,
        floats=floats,
        constants=constants,
    )
    y = F.conv2d(
        *(torch.from_numpy(a).double() for a in (x, weight, bias)), stride=stride, padding=padding, dilation=dilation, groups=channels
    )
    return got, y.flatten(2)


def random_case(shape, batch, seed):
    rng = np.random.default_rng(seed)
    channels, height, width, kernel = shape[:4]
    x = rng.standard_normal((batch, channels, height, width), dtype=np.float32)
    weight = rng.standard_normal((channels, 1, kernel, kernel), dtype=np.float32)
    return rng, x, weight, rng.standard_normal(channels, dtype=np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_equals_torch(isa, shape):
    _, x, weight, bias = random_case(shape, 2, 0)
    got, want = depthwise(isa, x, weight, bias, shape)
    assert_close(got, want)


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize("stride", [1, 2], ids=["s1", "s2"])
def test_gated_rows(isa, kind, stride):
    shape = (11, 9, 10, 3, stride, 1, 1)
    rng, x, weight, bias = random_case(shape, 3, 1)
    lists = active_lists(kind, 11, 3, rng)
    got, want = depthwise(isa, x, weight, bias, shape, lists=lists)
    assert_close(got, compact(want.numpy(), lists))


@pytest.mark.parametrize(
    ("activation", "function"),
    [((1, 0.0, 6.0), F.relu6), ((2, 0.0, 0.0), F.hardswish), ((5, 0.0, 0.0), F.silu)],
    ids=["relu6", "hardswish", "silu"],
)
def test_activation(isa, activation, function):
    shape = (3, 7, 9, 3, 1, 1, 1)
    _, x, weight, bias = random_case(shape, 1, 2)
    got, want = depthwise(isa, x, weight, bias, shape, activation=activation)
    assert_close(got, function(want))


def test_many_chunks(isa):
    shape = (64, 56, 56, 3, 1, 1, 1)
    _, x, weight, bias = random_case(shape, 1, 3)
    got, want = depthwise(isa, x, weight, bias, shape)
    assert_close(got, want)


def test_uneven_geometry(isa):
    """Kernel, stride, padding and dilation differ between the axes, and the padding between the sides."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((1, 2, 10, 23), dtype=np.float32)
    weight = rng.standard_normal((2, 1, 3, 5), dtype=np.float32)
    bias = np.zeros(2, np.float32)
    padded = F.pad(torch.from_numpy(x), (3, 1, 0, 2))
    want = F.conv2d(padded, torch.from_numpy(weight), stride=(1, 2), dilation=(2, 1), groups=2)
    ints = {
        "in_size": [2, 10, 23],
        "out_size": [2, *want.shape[2:]],
        "kernel": [3, 5],
        "stride": [1, 2],
        "padding": [0, 3, 2, 1],
        "dilation": [2, 1],
    }
    constants = {"weight": weight.reshape(2, -1), "bias": bias}
    got = run_step(isa, "depthwise", [x.reshape(1, 2, -1)], (2, want[0, 0].numel()), ints=ints, constants=constants)
    assert_close(got, want.flatten(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_size": [2, 3, 4]}, "the output must have 2 rows of 12 positions, got 2 of 16"),
        ({"out_size": [3, 4, 4]}, "same channels, got 2 and 3"),
        ({"kernel": [3]}, "'kernel' must hold 2 ints, got 1"),
        ({"kernel": [5, 5]}, r"'weight' must be \[2, 25\], got \[2, 9\]"),
        ({"stride": [0, 1]}, "must be >= 1"),
        ({"stride": [9, 1]}, "height 4, got out_size 4 at stride 9"),
    ],
    ids=["out_size", "channels", "kernel-rank", "weight", "stride", "window"],
)
def test_refuses_inconsistent_steps(change, message):
    ints = {"in_size": [2, 4, 4], "out_size": [2, 4, 4], "kernel": [3, 3], "padding": [1] * 4, **change}
    constants = {"weight": np.zeros((2, 9), np.float32), "bias": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match=f"step 'depthwise'.*{message}"):
        run_step(_C.chosen_isa(), "depthwise", [np.zeros((1, 2, 16), np.float32)], (2, 16), ints=ints, constants=constants)
