"""Pooling and means against torch, for every instruction set."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LIST_KINDS, assert_close
from single_step import active_lists, compact, run_step

from dynprune.runtime import _C

MAX, AVERAGE = 0, 1

# channels, height, width, kernel, stride, padding, ceil_mode
SHAPES = [
    (3, 4, 4, 2, 2, 0, False),
    (2, 7, 9, 3, 2, 1, False),
    (2, 8, 8, 3, 2, 0, True),
    (2, 13, 17, 3, 2, 1, True),
    (2, 33, 31, 3, 1, 1, False),
    (2, 14, 35, 5, 1, 2, False),
    (2, 12, 20, 3, 3, 1, True),
    (1, 112, 112, 3, 2, 1, False),
    (2, 7, 7, 7, 7, 0, False),
]


def shape_id(shape):
    channels, height, width, kernel, stride, padding, ceil_mode = shape
    return f"c{channels}h{height}w{width}k{kernel}s{stride}p{padding}{'ceil' if ceil_mode else ''}"


def pool(isa, mode, x, shape, want, *, lists=None, **extra):
    channels, height, width, kernel, stride, padding, _ = shape
    ints = {
        "mode": [mode],
        "in_size": [channels, height, width],
        "out_size": [channels, *want.shape[2:]],
        "kernel": [kernel, kernel],
        "stride": [stride, stride],
        "padding": [padding] * 4,
        **extra,
    }
    rows = compact(x.reshape(*x.shape[:2], -1), lists)
    return run_step(isa, "pool", [rows], (channels, want[0, 0].numel()), lists=lists, ints=ints)


def random_planes(shape, batch=2):
    return np.random.default_rng(0).standard_normal((batch, *shape[:3]), dtype=np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_max_equals_torch(isa, shape):
    x = random_planes(shape)
    want = F.max_pool2d(torch.from_numpy(x), *shape[3:6], ceil_mode=shape[6])
    assert_close(pool(isa, MAX, x, shape, want), want.flatten(2))


@pytest.mark.parametrize("include", [0, 1], ids=["inside", "include_pad"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_average_equals_torch(isa, shape, include):
    x = random_planes(shape)
    want = F.avg_pool2d(torch.from_numpy(x), *shape[3:6], ceil_mode=shape[6], count_include_pad=bool(include))
    assert_close(pool(isa, AVERAGE, x, shape, want, count_include_pad=[include]), want.flatten(2))


def test_average_with_divisor(isa):
    shape = (2, 9, 9, 3, 2, 1, False)
    x = random_planes(shape)
    want = F.avg_pool2d(torch.from_numpy(x), 3, 2, 1, divisor_override=5)
    assert_close(pool(isa, AVERAGE, x, shape, want, divisor=[5]), want.flatten(2))


def test_max_with_dilation(isa):
    shape = (2, 12, 19, 3, 1, 2, False)
    x = random_planes(shape)
    want = F.max_pool2d(torch.from_numpy(x), 3, 1, 1, dilation=2)
    got = pool(isa, MAX, x, (*shape[:5], 1, False), want, dilation=[2, 2])
    assert_close(got, want.flatten(2))


def test_max_hands_on_nan_and_infinity(isa):
    x = random_planes((2, 9, 20, 3, 1, 1, False), batch=1)
    x[0, 0, 4, 5] = np.nan
    x[0, 0, 0, 0] = np.nan
    x[0, 1] = -np.inf
    want = F.max_pool2d(torch.from_numpy(x), 3, 1, 1)
    got = pool(isa, MAX, x, (2, 9, 20, 3, 1, 1, False), want)
    np.testing.assert_array_equal(got, want.flatten(2).numpy())


@pytest.mark.parametrize("mode", [MAX, AVERAGE], ids=["max", "average"])
@pytest.mark.parametrize("kind", LIST_KINDS)
def test_gated_rows(isa, kind, mode):
    shape = (9, 8, 7, 2, 2, 0, False)
    x = random_planes(shape, batch=3)
    lists = active_lists(kind, 9, 3, np.random.default_rng(1))
    want = (F.max_pool2d if mode == MAX else F.avg_pool2d)(torch.from_numpy(x), 2, 2)
    assert_close(pool(isa, mode, x, shape, want, lists=lists), compact(want.flatten(2).numpy(), lists))


@pytest.mark.parametrize("mode", [MAX, AVERAGE], ids=["max", "average"])
@pytest.mark.parametrize("out", [(1, 1), (3, 2), (7, 7), (6, 11)], ids=lambda out: f"to{out[0]}x{out[1]}")
def test_adaptive_equals_torch(isa, out, mode):
    x = np.random.default_rng(2).standard_normal((2, 4, 7, 10), dtype=np.float32)
    want = (F.adaptive_max_pool2d if mode == MAX else F.adaptive_avg_pool2d)(torch.from_numpy(x), out)
    ints = {"mode": [mode], "in_size": [4, 7, 10], "out_size": [4, *out]}
    got = run_step(isa, "adaptive_pool", [x.reshape(2, 4, 70)], (4, out[0] * out[1]), ints=ints)
    assert_close(got, want.flatten(2))


@pytest.mark.parametrize("positions", [1, 7, 16, 49, 64, 65, 784], ids=lambda n: f"n{n}")
def test_mean_equals_torch(isa, positions):
    x = np.random.default_rng(3).standard_normal((2, 6, positions), dtype=np.float32)
    got = run_step(isa, "mean", [x], (6, 1))
    assert_close(got, x.astype(np.float64).mean(-1, keepdims=True))


@pytest.mark.parametrize("scatter", [0, 1], ids=["compact", "scatter"])
@pytest.mark.parametrize("kind", LIST_KINDS)
def test_mean_of_gated_rows(isa, kind, scatter):
    x = np.random.default_rng(4).standard_normal((3, 33, 20), dtype=np.float32)
    lists = active_lists(kind, 33, 3, np.random.default_rng(5))
    means = x.astype(np.float64).mean(-1, keepdims=True)
    got = run_step(isa, "mean", [compact(x, lists)], (33, 1), lists=lists, gated="in" if scatter else "both", ints={"scatter": [scatter]})
    if scatter:
        want = np.zeros_like(means)
        for sample, active in enumerate(lists):
            want[sample, active] = means[sample, active]
    else:
        want = compact(means, lists)
    assert_close(got, want)


@pytest.mark.parametrize(
    ("op", "ints", "message"),
    [
        ("pool", {"mode": [2], "kernel": [2, 2]}, r"mode must be 0 \(max\) or 1 \(average\), got 2"),
        ("pool", {"mode": [1], "kernel": [2, 2], "dilation": [2, 1]}, r"dilation must be \[1, 1\] for an average"),
        ("adaptive_pool", {"mode": [0], "in_size": [3, 4, 4]}, "same channels"),
    ],
    ids=["mode", "dilation", "channels"],
)
def test_refuses_inconsistent_steps(op, ints, message):
    sizes = {"in_size": [2, 4, 4], "out_size": [2, 2, 2]}
    with pytest.raises(ValueError, match=f"step '{op}'.*{message}"):
        run_step(_C.chosen_isa(), op, [np.zeros((1, 2, 16), np.float32)], (2, 4), ints={**sizes, **ints})
