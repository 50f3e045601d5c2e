"""Strided copies and fills against numpy, for every instruction set."""

import numpy as np
import pytest

from dynprune.runtime import _C

# sizes, permutation of the input's dimensions
PERMUTATIONS = [
    ((5,), (0,)),
    ((3, 4), (1, 0)),
    ((16, 16), (1, 0)),
    ((33, 65), (1, 0)),
    ((300, 20), (1, 0)),
    ((7, 5000), (1, 0)),
    ((5000, 7), (1, 0)),
    ((4, 5, 6), (2, 0, 1)),
    ((4, 5, 6), (0, 2, 1)),
    ((4, 5, 6), (2, 1, 0)),
    ((2, 3, 4, 5), (0, 2, 1, 3)),
    ((2, 3, 4, 5), (3, 1, 2, 0)),
    ((2, 3, 2, 3, 2, 17), (4, 1, 5, 0, 3, 2)),
    ((1, 64, 31), (0, 2, 1)),
]


def strides_of(array):
    return [stride // array.itemsize for stride in array.strides]


def run(isa, op, buffers, inputs, ints, num_threads=1, **attributes):
    """Runs a copy or fill whose output is the last buffer; operands give buffer and offset only."""
    step = {"op": op, "inputs": inputs, "output": (len(buffers) - 1, 0, 0, 0, 0), "ints": ints, **attributes}
    _C.StepRunner(isa, step, buffers, num_threads=num_threads).run()


def copy(isa, x, out_shape, view, **keywords):
    """Copies `view` (of x) to a fresh contiguous array of its shape."""
    out = np.full((1, int(np.prod(out_shape))), np.nan, np.float32)
    target = out.reshape(out_shape)
    ints = {"sizes": list(out_shape), "in_strides": strides_of(view), "out_strides": strides_of(target)}
    run(isa, "copy", [x.reshape(1, -1), out], [(0, 0, 0, 0, 0)], ints, **keywords)
    return target


@pytest.mark.parametrize(("sizes", "order"), PERMUTATIONS, ids=lambda v: "x".join(map(str, v)))
def test_permutations(isa, sizes, order):
    x = np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)
    want = x.transpose(order)
    np.testing.assert_array_equal(copy(isa, x, want.shape, want), want)


def test_slices_and_batches(isa):
    """A window of each sample goes to every second column of a window of the output; the rest of the output stays."""
    x = np.random.default_rng(0).standard_normal((3, 8, 10), dtype=np.float32)
    out = np.full((3, 6, 20), np.nan, np.float32)
    ints = {"sizes": [4, 5], "in_strides": [10, 1], "out_strides": [20, 2]}
    step = {"op": "copy", "inputs": [(0, 23, 0, 0, 0)], "output": (1, 41, 0, 0, 0), "ints": ints}
    _C.StepRunner(isa, step, [x.reshape(3, -1), out.reshape(3, -1)]).run()
    want = np.full((3, 6, 20), np.nan, np.float32)
    want[:, 2:6, 1:11:2] = x[:, 2:6, 3:8]
    np.testing.assert_array_equal(out, want)


def test_broadcasts(isa):
    x = np.arange(35, dtype=np.float32)
    want = np.broadcast_to(x, (6, 35))
    np.testing.assert_array_equal(copy(isa, x, (6, 35), want), want)
    want = np.broadcast_to(x[:, None], (35, 20))
    np.testing.assert_array_equal(copy(isa, x, (35, 20), want), want)


def test_scalar_and_empty(isa):
    x = np.array([7.0], np.float32)
    np.testing.assert_array_equal(copy(isa, x, (1, 1), x.reshape(1, 1)), [[7.0]])
    out = np.full((1, 4), np.nan, np.float32)
    run(isa, "copy", [x.reshape(1, 1), out], [(0, 0, 0, 0, 0)], {"sizes": [0, 4], "in_strides": [1, 1], "out_strides": [4, 1]})
    assert np.isnan(out).all()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)], ids=str)
def test_large_copies_are_cut_into_chunks(isa, order):
    x = np.arange(40 * 50 * 60, dtype=np.float32).reshape(40, 50, 60)
    want = x.transpose(order)
    np.testing.assert_array_equal(copy(isa, x, want.shape, want, num_threads=2), want)


def test_constant_source(isa):
    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    out = np.full((2, 12), np.nan, np.float32)
    ints = {"sizes": [4, 3], "in_strides": [1, 4], "out_strides": [3, 1]}
    run(isa, "copy", [out], [], ints, constants={"source": source})
    np.testing.assert_array_equal(out.reshape(2, 4, 3), np.broadcast_to(source.T, (2, 4, 3)))


def test_fill(isa):
    out = np.full((2, 10, 30), np.nan, np.float32)
    run(isa, "fill", [out.reshape(2, -1)], [], {"sizes": [10, 3], "out_strides": [30, 1]}, floats={"value": [2.5]})
    want = np.full((2, 10, 30), np.nan, np.float32)
    want[:, :, :3] = 2.5
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        ("copy", {"ints": {"sizes": [1] * 7, "in_strides": [1] * 7, "out_strides": [1] * 7}}, "rank 6 or less"),
        ("copy", {"ints": {"sizes": [2, 2], "in_strides": [1], "out_strides": [2, 1]}}, "'sizes' and 'in_strides' of one length"),
        ("copy", {"ints": {"sizes": [2], "in_strides": [1], "out_strides": [0]}}, "out_strides must be >= 1, got 0"),
        (
            "copy",
            {"ints": {"sizes": [3], "in_strides": [2], "out_strides": [1]}, "constants": {"source": np.ones(4, np.float32)}},
            "must have more than 4 elements, got 4",
        ),
        ("fill", {"ints": {"sizes": [2], "out_strides": [1]}}, "needs floats 'value'"),
    ],
    ids=["rank", "strides", "zero-stride", "source", "value"],
)
def test_refuses_inconsistent_steps(op, attributes, message):
    buffers = [np.zeros((1, 8), np.float32), np.zeros((1, 8), np.float32)]
    inputs = [] if op == "fill" or "constants" in attributes else [(0, 0, 0, 0, 0)]
    with pytest.raises(ValueError, match=f"step '{op}'.*{message}"):
        run(_C.chosen_isa(), op, buffers, inputs, **attributes)
