"""Products of two values, attention with groups of heads, embeddings and resampling, against PyTorch on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LIST_KINDS, active_list, assert_close, run_step

BATCH = 2


def filled(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def strides_of(shape: tuple[int, ...], order: tuple[int, ...]) -> list[int]:
    """Returns the strides of memory without gaps, nested in `order`, outermost first."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim], step = step, step * shape[dim]
    return strides


def laid_out(x: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, *(d + 1 for d in order))).reshape(len(x), -1)


ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0))


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize(("left_order", "right_order"), [(a, b) for a in ORDERS for b in ORDERS], ids=str)
def test_matmul_of_any_layout(isa: str, left_order, right_order, threads: int) -> None:
    rng = np.random.default_rng(0)
    for matrices, rows, inner, columns in ((3, 5, 7, 9), (1, 1, 1, 1), (2, 17, 33, 65), (4, 49, 32, 49)):
        left, right = filled(rng, BATCH, matrices, rows, inner), filled(rng, BATCH, matrices, inner, columns)
        out = np.full((BATCH, matrices * rows * columns), np.nan, np.float32)
        step = {
            "op": "matmul",
            "inputs": [(0, 0, 1, 0, left[0].size), (1, 0, 1, 0, right[0].size)],
            "output": (2, 0, 1, 0, out.shape[1]),
            "ints": {
                "batch": [matrices],
                "rows": [rows],
                "inner": [inner],
                "positions": [columns],
                "left_strides": strides_of((matrices, rows, inner), left_order),
                "right_strides": strides_of((matrices, inner, columns), right_order),
                "out_strides": strides_of((matrices, rows, columns), (0, 1, 2)),
            },
            "floats": {"scale": [0.5]},
        }
        run_step(isa, step, [laid_out(left, left_order), laid_out(right, right_order), out], num_threads=threads)
        want = 0.5 * torch.from_numpy(left) @ torch.from_numpy(right)
        assert_close(out.reshape(want.shape), want, factor=inner**0.5, context=f"{matrices}x{rows}x{inner}x{columns}")


def test_matmul_broadcasts_and_cuts_long_products(isa: str) -> None:
    rng = np.random.default_rng(1)
    left, right = filled(rng, BATCH, 300, 257), filled(rng, BATCH, 3, 257, 70)
    out = np.full((BATCH, 3 * 300 * 70), np.nan, np.float32)
    ints = {"batch": [3], "rows": [300], "inner": [257], "positions": [70], "left_strides": [0, 257, 1]}
    ints |= {"right_strides": [257 * 70, 70, 1], "out_strides": [300 * 70, 70, 1]}
    operands = [(0, 0, 1, 0, left[0].size), (1, 0, 1, 0, right[0].size)]
    step = {"op": "matmul", "inputs": operands, "output": (2, 0, 1, 0, out.shape[1]), "ints": ints}
    run_step(isa, step, [left.reshape(BATCH, -1), right.reshape(BATCH, -1), out], num_threads=2)
    want = torch.from_numpy(left)[:, None] @ torch.from_numpy(right)
    assert_close(out.reshape(want.shape), want, factor=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left_strides": [40, 8, 1]}, "left_strides reach beyond"),
        ({"out_strides": [20, 5, 2]}, "out_strides reach beyond|contiguous"),
        ({"right_strides": [-1, 5, 1]}, "must be >= 0"),
        ({"rows": [0]}, "must be >= 1"),
        ({"batch": [1] * 5}, "rank 4"),
        ({"inner": [1 << 30]}, "reach beyond"),
    ],
)
def test_matmul_refuses_what_does_not_fit(change: dict, message: str) -> None:
    ints = {"batch": [2], "rows": [4], "inner": [3], "positions": [5], "left_strides": [12, 3, 1], "right_strides": [15, 5, 1]}
    ints |= {"out_strides": [20, 5, 1]} | change
    buffers = [np.zeros((1, n), np.float32) for n in (24, 30, 40)]
    step = {"op": "matmul", "inputs": [(0, 0, 1, 0, 24), (1, 0, 1, 0, 30)], "output": (2, 0, 1, 0, 40), "ints": ints}
    with pytest.raises(ValueError, match=message):
        run_step("scalar", step, buffers)


def attention_step(outer: int, heads: int, size: int, queries: int, keys: int, **more) -> dict:
    rows = outer * heads * size
    key_rows = outer * more.get("key_heads", [heads])[0] * size
    inputs = [(0, 0, rows, queries, queries), (1, 0, key_rows, keys, keys), (2, 0, key_rows, keys, keys)]
    ints = {"outer": [outer], "heads": [heads], "causal": [0]} | more
    return {"op": "attention", "inputs": inputs, "output": (3, 0, rows, queries, queries), "ints": ints, "floats": {"scale": [size**-0.5]}}


def reference(q, k, v, heads: int, mask=None) -> torch.Tensor:
    """Returns attention of (batch, outer, heads, size, tokens) values, in the same form; keys may have fewer heads."""
    q, k, v = (torch.from_numpy(x).transpose(-1, -2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(-1, -2)


@pytest.mark.parametrize("key_heads", (4, 2, 1))
@pytest.mark.parametrize("masked", ("none", "all", "head", "group", "input"))
def test_attention_with_groups_shared_keys_and_masks(isa: str, key_heads: int, masked: str) -> None:
    rng = np.random.default_rng(2)
    outer, heads, size, queries, keys = 3, 4, 8, 17, 19
    q, k = filled(rng, BATCH, outer, heads, size, queries), filled(rng, BATCH, outer, key_heads, size, keys)
    v = filled(rng, BATCH, outer, key_heads, size, keys)
    out = np.full((BATCH, outer * heads * size * queries), np.nan, np.float32)
    step = attention_step(outer, heads, size, queries, keys, key_heads=[key_heads])
    buffers = [x.reshape(BATCH, -1) for x in (q, k, v)] + [out]
    mask = None
    if masked == "input":
        values = filled(rng, BATCH, keys, queries)
        step["inputs"].append((4, 0, keys, queries, queries))
        buffers.append(values.reshape(BATCH, -1))
        mask = torch.from_numpy(values).transpose(-1, -2)[:, None, None]
    elif masked != "none":
        lead = {"all": (1, 1), "head": (1, heads), "group": (outer, heads)}[masked]
        values = filled(rng, *lead, keys, queries)
        step["constants"] = {"mask": np.ascontiguousarray(values.reshape(-1, queries))}
        mask = torch.from_numpy(values).transpose(-1, -2)
    run_step(isa, step, buffers, num_threads=2)
    want = reference(q, k, v, heads, mask)
    assert_close(out.reshape(want.shape), want, factor=4)


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize("gated_keys", (False, True))
@pytest.mark.parametrize("outer", (1, 3))
def test_attention_runs_the_heads_of_its_site(isa: str, outer: int, gated_keys: bool, kind: str) -> None:
    rng = np.random.default_rng(3)
    heads, size, tokens = 5, 4, 21
    values = [filled(rng, BATCH, outer, heads, size, tokens) for _ in range(3)]
    mask = filled(rng, heads, tokens, tokens)
    running = [active_list(kind, heads, rng) for _ in range(BATCH)]
    compact = []
    for number, value in enumerate(values):
        held = value.copy()
        if number == 0 or gated_keys:
            held = np.full_like(value, np.nan)
            for sample, chosen in enumerate(running):
                held[sample, :, : len(chosen)] = value[sample][:, chosen]
        compact.append(held.reshape(BATCH, -1))
    out = np.full((BATCH, outer, heads, size, tokens), np.nan, np.float32)
    step = attention_step(outer, heads, size, tokens, tokens, gated_keys=[int(gated_keys)])
    step |= {"in_site": 0, "out_site": 0, "constants": {"mask": mask.reshape(-1, tokens)}}
    lists = [[(h * size + i) for h in chosen for i in range(size)] for chosen in running]
    flat = out.reshape(BATCH, -1)
    run_step(isa, step, [*compact, flat], sites=[heads * size], active=[lists], num_threads=2)
    want = reference(*values, heads, torch.from_numpy(mask).transpose(-1, -2))
    for sample, chosen in enumerate(running):
        assert_close(out[sample, :, : len(chosen)], want[sample][:, chosen], factor=4, context=str(chosen))
        assert np.isnan(out[sample, :, len(chosen) :]).all(), "wrote rows of heads that do not run"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": [3]}, "must divide"),
        ({"outer": [5]}, "must divide"),
        ({"key_heads": [0]}, "must divide"),
        ({"gated_keys": [1]}, "need a site"),
    ],
)
def test_attention_refuses_what_does_not_fit(change: dict, message: str) -> None:
    step = attention_step(1, 2, 4, 6, 6)
    step["ints"] |= change
    with pytest.raises(ValueError, match=message):
        run_step("scalar", step, [np.zeros((1, 48), np.float32) for _ in range(4)])


def numbers(values: np.ndarray) -> np.ndarray:
    """Returns int64 numbers in the form in which a plan's buffer holds them."""
    return np.ascontiguousarray(values.astype(np.int64)).view(np.float32)


@pytest.mark.parametrize("features", (1, 5, 64))
@pytest.mark.parametrize("tokens", (1, 3, 130))
def test_embedding(isa: str, features: int, tokens: int) -> None:
    rng = np.random.default_rng(4)
    table, index = filled(rng, 11, features), rng.integers(0, 11, (BATCH, tokens))
    out = np.full((BATCH, features * tokens), np.nan, np.float32)
    step = {"op": "embedding", "inputs": [(0, 0, 1, 2 * tokens, 2 * tokens)], "output": (1, 0, features, tokens, tokens)}
    step |= {"ints": {"entries": [11]}, "constants": {"table": table}}
    run_step(isa, step, [numbers(index), out], num_threads=2)
    assert np.array_equal(out.reshape(BATCH, features, tokens), table[index].transpose(0, 2, 1))


def test_embedding_of_numbers_outside_the_table_is_nan(isa: str) -> None:
    table, index = np.ones((3, 2), np.float32), np.array([[0, 3, -1, 2, 2**62]])
    out = np.zeros((1, 10), np.float32)
    step = {
        "op": "embedding",
        "inputs": [(0, 0, 1, 10, 10)],
        "output": (1, 0, 2, 5, 5),
        "ints": {"entries": [3]},
        "constants": {"table": table},
    }
    run_step(isa, step, [numbers(index), out])
    assert np.array_equal(np.isnan(out.reshape(2, 5)), [[False, True, True, False, True]] * 2)


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize(("size", "out_size"), [((5, 7), (10, 14)), ((8, 6), (3, 13)), ((1, 1), (4, 4))])
def test_resample(isa: str, size, out_size, kind: str) -> None:
    rng = np.random.default_rng(5)
    channels, taps = 6, 2
    x, lists = filled(rng, BATCH, channels, *size), [active_list(kind, channels, rng) for _ in range(BATCH)]
    ints, constants, matrices = {"in_size": [channels, *size], "out_size": [channels, *out_size]}, {}, []
    for name, inputs, outputs in (("y", size[0], out_size[0]), ("x", size[1], out_size[1])):
        index, weight = rng.integers(0, inputs, (outputs, taps)), filled(rng, outputs, taps)
        ints[f"{name}_index"], constants[f"{name}_weight"] = index.reshape(-1).tolist(), weight
        matrix = np.zeros((outputs, inputs), np.float32)
        np.add.at(matrix, (np.arange(outputs)[:, None], index), weight)
        matrices.append(matrix)
    held = np.full_like(x, np.nan)
    for sample, chosen in enumerate(lists):
        held[sample, : len(chosen)] = x[sample, chosen]
    out = np.full((BATCH, channels, *out_size), np.nan, np.float32)
    step = {"op": "resample", "inputs": [(0, 0, channels, size[0] * size[1], size[0] * size[1])], "ints": ints, "constants": constants}
    step |= {"output": (1, 0, channels, out_size[0] * out_size[1], out_size[0] * out_size[1]), "in_site": 0, "out_site": 0}
    run_step(
        isa, step, [held.reshape(BATCH, -1), out.reshape(BATCH, -1)], sites=[channels], active=[[c.tolist() for c in lists]], num_threads=2
    )
    want = np.einsum("oh,bchw,pw->bcop", matrices[0], x, matrices[1])
    for sample, chosen in enumerate(lists):
        assert_close(out[sample, : len(chosen)], want[sample, chosen], factor=4)


def test_resample_refuses_inputs_outside_the_plane() -> None:
    ints = {"in_size": [1, 2, 2], "out_size": [1, 1, 1], "y_index": [2], "x_index": [0]}
    constants = {"y_weight": np.ones((1, 1), np.float32), "x_weight": np.ones((1, 1), np.float32)}
    step = {"op": "resample", "inputs": [(0, 0, 1, 4, 4)], "output": (1, 0, 1, 1, 1), "ints": ints, "constants": constants}
    with pytest.raises(ValueError, match="y_index"):
        run_step("scalar", step, [np.zeros((1, 4), np.float32), np.zeros((1, 1), np.float32)])
