"""Layer norm, rms norm and softmax along both axes against torch, for every instruction set."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from single_step import run_step

from dynprune.runtime import _C

ROWS, POSITIONS = 0, 1
SHAPES = [(1, 1), (3, 7), (5, 15), (8, 16), (6, 17), (4, 33), (96, 49), (9, 65), (7, 100), (768, 5)]


def shape_id(shape):
    return f"c{shape[0]}n{shape[1]}"


def layer_norm(isa, x, axis, weight=None, bias=None, eps=1e-5, **keywords):
    constants = {name: value for name, value in (("weight", weight), ("bias", bias)) if value is not None}
    return run_step(isa, "layer_norm", [x], x.shape[1:], ints={"axis": [axis]}, floats={"eps": [eps]}, constants=constants, **keywords)


def torch_layer_norm(x, axis, weight=None, bias=None, eps=1e-5):
    x = torch.from_numpy(x).double()
    if axis == ROWS:
        x = x.transpose(1, 2)
    parameters = [None if p is None else torch.from_numpy(p).double() for p in (weight, bias)]
    y = F.layer_norm(x, x.shape[-1:], *parameters, eps)
    return y.transpose(1, 2) if axis == ROWS else y


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("axis", [ROWS, POSITIONS], ids=["rows", "positions"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_layer_norm_equals_torch(isa, shape, axis, affine):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *shape), dtype=np.float32) * 3 + 1
    weight, bias = rng.standard_normal((2, shape[axis]), dtype=np.float32) if affine else (None, None)
    assert_close(layer_norm(isa, x, axis, weight, bias), torch_layer_norm(x, axis, weight, bias))


@pytest.mark.parametrize("axis", [ROWS, POSITIONS], ids=["rows", "positions"])
def test_layer_norm_of_a_small_spread_around_a_large_mean(isa, axis):
    """E[x^2] - E[x]^2 would lose every digit here."""
    x = (1000 + np.random.default_rng(1).standard_normal((1, 64, 40))).astype(np.float32)
    np.testing.assert_allclose(layer_norm(isa, x, axis), torch_layer_norm(x, axis), atol=1e-3)


@pytest.mark.parametrize("axis", [ROWS, POSITIONS], ids=["rows", "positions"])
def test_layer_norm_with_one_huge_channel(isa, axis):
    x = np.random.default_rng(2).standard_normal((1, 64, 64), dtype=np.float32)
    x[:, 0, 0] = 3e4
    assert_close(layer_norm(isa, x, axis), torch_layer_norm(x, axis))


def test_many_chunks(isa):
    x = np.random.default_rng(3).standard_normal((1, 192, 1000), dtype=np.float32)
    assert_close(layer_norm(isa, x, ROWS), torch_layer_norm(x, ROWS))


def rms_norm(isa, x, axis, weight=None, eps=1e-6):
    constants = {} if weight is None else {"weight": weight}
    return run_step(isa, "rms_norm", [x], x.shape[1:], ints={"axis": [axis]}, floats={"eps": [eps]}, constants=constants)


def torch_rms_norm(x, axis, weight=None, eps=1e-6):
    x = torch.from_numpy(x).double()
    if axis == ROWS:
        x = x.transpose(1, 2)
    y = F.rms_norm(x, x.shape[-1:], None if weight is None else torch.from_numpy(weight).double(), eps)
    return y.transpose(1, 2) if axis == ROWS else y


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("axis", [ROWS, POSITIONS], ids=["rows", "positions"])
@pytest.mark.parametrize("shape", [*SHAPES, (192, 1000)], ids=shape_id)
def test_rms_norm_equals_torch(isa, shape, axis, affine):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, *shape), dtype=np.float32) * 3 + 1
    weight = rng.standard_normal(shape[axis], dtype=np.float32) if affine else None
    assert_close(rms_norm(isa, x, axis, weight), torch_rms_norm(x, axis, weight))


@pytest.mark.parametrize("axis", [ROWS, POSITIONS], ids=["rows", "positions"])
def test_rms_norm_of_special_values(isa, axis):
    x = np.random.default_rng(7).standard_normal((1, 40, 40), dtype=np.float32)
    x[0, :2, :2] = 0
    x[0, 3, 4], x[0, 5, 6], x[0, 7, 8] = 3e4, np.nan, np.inf
    x[0, 20, :], x[0, :, 20] = 0, 0  # eps alone is left of one
    got, want = rms_norm(isa, x, axis), torch_rms_norm(x, axis).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [ROWS, POSITIONS], ids=["rows", "positions"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_softmax_equals_torch(isa, shape, axis):
    x = np.random.default_rng(4).standard_normal((2, *shape), dtype=np.float32) * 5
    got = run_step(isa, "softmax", [x], shape, ints={"axis": [axis]})
    assert_close(got, torch.softmax(torch.from_numpy(x).double(), axis + 1))


@pytest.mark.parametrize("axis", [ROWS, POSITIONS], ids=["rows", "positions"])
def test_softmax_of_special_values(isa, axis):
    x = np.random.default_rng(5).standard_normal((1, 20, 20), dtype=np.float32)
    x[0, 3, :] = -np.inf  # a masked key, a fully masked query
    x[0, :, 4] = -np.inf
    x[0, 6, 7] = np.nan
    x[0, 8, 9] = np.inf
    x[0, 10, :] += 1e4
    got = run_step(isa, "softmax", [x], (20, 20), ints={"axis": [axis]})
    want = torch.softmax(torch.from_numpy(x), axis + 1).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        ("softmax", {"ints": {"axis": [2]}}, "axis must be 0"),
        ("layer_norm", {"ints": {"axis": [0]}}, "needs floats 'eps'"),
        ("rms_norm", {"ints": {"axis": [0]}}, "needs floats 'eps'"),
        (
            "rms_norm",
            {"ints": {"axis": [0]}, "floats": {"eps": [1e-5]}, "constants": {"bias": np.ones(2, np.float32)}},
            "takes no constant 'bias'",
        ),
        (
            "layer_norm",
            {"ints": {"axis": [0]}, "floats": {"eps": [1e-5]}, "constants": {"weight": np.ones(16, np.float32)}},
            r"must be \[2\]",
        ),
    ],
    ids=["axis", "eps", "rms_eps", "rms_bias", "weight"],
)
def test_refuses_inconsistent_steps(op, attributes, message):
    with pytest.raises(ValueError, match=f"step '{op}'.*{message}"):
        run_step(_C.chosen_isa(), op, [np.zeros((1, 2, 16), np.float32)], (2, 16), **attributes)
