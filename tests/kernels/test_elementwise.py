"""Activations, affine maps and binary operations against torch, for every instruction set."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LIST_KINDS, assert_close
from single_step import active_lists, compact, run_step

from dynprune.runtime import _C

INF = float("inf")

# name: (kind in the order of `Activation`, low, high, the same in torch)
ACTIVATIONS = {
    "none": (0, 0.0, 0.0, lambda x: x),
    "relu": (1, 0.0, INF, F.relu),
    "clamp": (1, -0.5, 0.75, lambda x: x.clamp(-0.5, 0.75)),
    "hardswish": (2, 0.0, 0.0, F.hardswish),
    "hardsigmoid": (3, 0.0, 0.0, F.hardsigmoid),
    "sigmoid": (4, 0.0, 0.0, torch.sigmoid),
    "silu": (5, 0.0, 0.0, F.silu),
    "gelu": (6, 0.0, 0.0, F.gelu),
    "gelu_tanh": (7, 0.0, 0.0, lambda x: F.gelu(x, approximate="tanh")),
    "tanh": (8, 0.0, 0.0, torch.tanh),
    "leaky_relu": (9, 0.1, 0.0, lambda x: F.leaky_relu(x, 0.1)),
    "elu": (10, 1.5, 0.0, lambda x: F.elu(x, 1.5)),
    "exp": (11, 0.0, 0.0, torch.exp),
    "softplus": (12, 0.0, 0.0, F.softplus),
    "mish": (13, 0.0, 0.0, F.mish),
    "sqrt": (14, 0.0, 0.0, torch.sqrt),
    "rsqrt": (15, 0.0, 0.0, torch.rsqrt),
    "neg": (16, 0.0, 0.0, torch.neg),
    "abs": (17, 0.0, 0.0, torch.abs),
    "square": (18, 0.0, 0.0, torch.square),
    "reciprocal": (19, 0.0, 0.0, torch.reciprocal),
    "erf": (20, 0.0, 0.0, torch.erf),
    "log": (21, 0.0, 0.0, torch.log),
}
# The largest error against the exact function, in units of 2^-24: relative to the result, or for what vanishes far below zero relative
# to the input.
UNITS_OF_RESULT = {"sigmoid": 6, "tanh": 6, "exp": 4, "erf": 6, "log": 4, "softplus": 8, "sqrt": 2, "rsqrt": 3, "reciprocal": 2, "elu": 6}
UNITS_OF_INPUT = {"silu": 6, "gelu": 6, "gelu_tanh": 6, "mish": 6, "hardswish": 6, "hardsigmoid": 3}

BINARIES = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "max": torch.maximum, "min": torch.minimum}


def apply(isa, name, x, **keywords):
    kind, low, high, _ = ACTIVATIONS[name]
    attributes = {"ints": {"activation": [kind]}, "floats": {"activation": [low, high]}}
    return run_step(isa, "unary", [x], x.shape[1:], **attributes, **keywords)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_torch(isa, name):
    x = np.random.default_rng(0).standard_normal((2, 3, 35), dtype=np.float32) * 4
    got = apply(isa, name, x)
    want = ACTIVATIONS[name][3](torch.from_numpy(x).double())
    assert_close(got, want)


@pytest.mark.parametrize("name", [*UNITS_OF_RESULT, *UNITS_OF_INPUT])
def test_activation_is_accurate(isa, name):
    """Over many magnitudes, both signs."""
    powers = np.logspace(-30, 1.9, 4000)
    x = np.concatenate([-powers[::-1], powers, np.linspace(-12, 12, 4001)]).astype(np.float32)
    if name in ("log", "sqrt", "rsqrt"):
        x = np.abs(x[x != 0])
    if name == "reciprocal":
        x = x[x != 0]
    want = ACTIVATIONS[name][3](torch.from_numpy(x).double()).numpy()
    got = apply(isa, name, x.reshape(1, 1, -1)).ravel().astype(np.float64)
    if name in UNITS_OF_RESULT:
        bound = UNITS_OF_RESULT[name] * np.maximum(np.abs(want), 2.0**-126)
    else:
        bound = UNITS_OF_INPUT[name] * np.maximum.reduce([np.abs(x), np.abs(want), np.full_like(want, 2.0**-126)])
    normal = np.abs(want) < 3.4e38
    excess = np.where(normal, np.abs(got - want) / (bound * 2.0**-24), 0.0)
    worst = int(np.argmax(excess))
    assert excess[worst] <= 1.0, f"{name}({x[worst]!r}) is {got[worst]!r}, exactly {want[worst]!r}: {excess[worst]:.1f} times the bound"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_special_values(isa, name):
    x = np.array([np.nan, INF, -INF, 0.0, 89.0, -89.0, -104.0, 1e30, -1e30, 20.5, -1.0], np.float32)
    got = apply(isa, name, x.reshape(1, 1, -1)).ravel()
    want = ACTIVATIONS[name][3](torch.from_numpy(x).double()).float().numpy()
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-36)  # a denormal on the way may be flushed to 0


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize("positions", [1, 15, 49], ids=lambda n: f"n{n}")
def test_gated_unary(isa, kind, positions):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 9, positions), dtype=np.float32)
    lists = active_lists(kind, 9, 3, rng)
    got = apply(isa, "silu", compact(x, lists), lists=lists)
    assert_close(got, compact(F.silu(torch.from_numpy(x).double()).numpy(), lists))


def test_large_planes_are_cut_along_positions(isa):
    x = np.random.default_rng(2).standard_normal((1, 2, 50000), dtype=np.float32)
    np.testing.assert_array_equal(apply(isa, "relu", x), np.maximum(x, 0))


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize("name", ["none", "relu", "gelu"])
def test_affine(isa, kind, name):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 10, 17), dtype=np.float32)
    scale, shift = rng.standard_normal((2, 10), dtype=np.float32)
    lists = active_lists(kind, 10, 3, rng)
    code, low, high, function = ACTIVATIONS[name]
    got = run_step(
        isa,
        "affine",
        [compact(x, lists)],
        (10, 17),
        lists=lists,
        ints={"activation": [code]},
        floats={"activation": [low, high]},
        constants={"scale": scale, "shift": shift},
    )
    want = function(torch.from_numpy(x).double() * torch.from_numpy(scale)[:, None] + torch.from_numpy(shift)[:, None])
    assert_close(got, compact(want.numpy(), lists))


@pytest.mark.parametrize("reverse", [0, 1], ids=["a-b", "b-a"])
@pytest.mark.parametrize("b_shape", [(6, 21), (1, 21), (6, 1), (1, 1)], ids=lambda s: f"b{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", BINARIES)
def test_binary_broadcasts(isa, name, b_shape, reverse):
    rng = np.random.default_rng(4)
    a = rng.standard_normal((2, 6, 21), dtype=np.float32)
    b = rng.standard_normal((2, *b_shape), dtype=np.float32)
    ints = {"kind": [list(BINARIES).index(name)], "reverse": [reverse]}
    got = run_step(isa, "binary", [a, b], (6, 21), ints=ints)
    operands = [torch.from_numpy(v).double() for v in (a, b)]
    assert_close(got, BINARIES[name](*(reversed(operands) if reverse else operands)))


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize("b_shape", [(12, 19), (1, 19), (12, 1)], ids=lambda s: f"b{s[0]}x{s[1]}")
@pytest.mark.parametrize("constant", [False, True], ids=["input", "constant"])
def test_gated_binary(isa, kind, b_shape, constant):
    """An input's rows are compact, a constant's are true channels."""
    rng = np.random.default_rng(5)
    a = rng.standard_normal((3, 12, 19), dtype=np.float32)
    b = rng.standard_normal((1 if constant else 3, *b_shape), dtype=np.float32)
    lists = active_lists(kind, 12, 3, rng)
    inputs, constants = [compact(a, lists)], {}
    if constant:
        constants["operand"] = b[0]
    else:
        inputs.append(b if b_shape[0] == 1 else compact(b, lists))
    got = run_step(isa, "binary", inputs, (12, 19), lists=lists, ints={"kind": [1]}, constants=constants)
    assert_close(got, compact(a.astype(np.float64) - b, lists))


@pytest.mark.parametrize("handover", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_handover_where_the_branch_is_off(isa, name, handover):
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((2, 3, 5, 18), dtype=np.float32)
    code, low, high, function = ACTIVATIONS[name]
    on = [True, False, True]
    got = run_step(
        isa,
        "binary",
        [a, b],
        (5, 18),
        branch=on,
        ints={"kind": [0], "handover": [handover], "activation": [code]},
        floats={"activation": [low, high]},
    )
    total = a.astype(np.float64) + b
    total[1] = (a, b)[handover][1]
    assert_close(got, function(torch.from_numpy(total)))


def test_without_handover_nothing_is_written_where_the_branch_is_off(isa):
    a = np.ones((2, 3, 18), np.float32)
    got = run_step(isa, "binary", [a, a], (3, 18), branch=[False, True], ints={"kind": [0]})
    assert np.isnan(got[0]).all()
    assert (got[1] == 2).all()


@pytest.mark.parametrize("name", ["max", "min"])
def test_maximum_and_minimum_hand_on_nan(isa, name):
    a = np.array([np.nan, 1.0, np.nan, 2.0] * 5, np.float32).reshape(1, 1, 20)
    b = np.array([1.0, np.nan, np.nan, 3.0] * 5, np.float32).reshape(1, 1, 20)
    got = run_step(isa, "binary", [a, b], (1, 20), ints={"kind": [list(BINARIES).index(name)]})
    np.testing.assert_array_equal(got, BINARIES[name](torch.from_numpy(a), torch.from_numpy(b)).numpy())


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        ("unary", {"ints": {"activation": [99]}}, "unknown activation 99"),
        ("affine", {"constants": {"scale": np.ones(3, np.float32), "shift": np.ones(2, np.float32)}}, r"'scale' must be \[2\], got \[3\]"),
        ("binary", {"ints": {"kind": [6]}}, "kind must be 0 to 5, got 6"),
        ("binary", {"ints": {"kind": [0]}}, "must have 2 inputs, got 1"),
        ("binary", {"ints": {"kind": [0]}, "constants": {"operand": np.ones((2, 3), np.float32)}}, r"must be \[1 or 2, 1 or 16\]"),
        ("nonsense", {}, "op must be one of conv, linear, .*, got 'nonsense'"),
    ],
    ids=["activation", "scale", "kind", "inputs", "operand", "op"],
)
def test_refuses_inconsistent_steps(op, attributes, message):
    with pytest.raises(ValueError, match=f"step '{op}'.*{message}"):
        run_step(_C.chosen_isa(), op, [np.zeros((1, 2, 16), np.float32)], (2, 16), **attributes)
