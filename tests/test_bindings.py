"""The extension: its stub names what it has, and no description of a step or plan, however wrong, harms the process."""

from __future__ import annotations

import ast
import copy
import inspect
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dynprune.runtime import _C

ODD_INTS = (-(2**63), -(2**40), -7, -1, 0, 1, 2, 3, 5, 8, 17, 64, 1000, 2**16 + 1, 2**31 - 1, 2**31 + 1, 2**40, 2**62, 2**63 - 1, 2**70)
ODD_THINGS = (None, "x", 1.5, float("nan"), [], {}, (1, 2), b"y", np.zeros(3), object())
REFUSALS = (ValueError, TypeError, KeyError, IndexError, RuntimeError, MemoryError)


def constant(*sizes: int) -> np.ndarray:
    return np.linspace(-1, 1, int(np.prod(sizes)), dtype=np.float32).reshape(sizes)


def good_steps() -> list[tuple[dict, list[int]]]:
    """Returns one valid step of each operation, with the channels of its sites; buffer 0 is read, 1 written, 2 read."""
    x, y = (0, 0, 8, 12, 12), (1, 0, 8, 12, 12)
    plane = {"in_size": [8, 3, 4], "out_size": [8, 3, 4]}
    window = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1]}
    gated = {"in_site": 0, "out_site": 0}
    clamp = {"floats": {"activation": [0.0, 6.0]}}
    conv = {"constants": {"weight": constant(8, 72), "bias": constant(8)}, "floats": {"activation": [0.0, 6.0]}}
    conv_ints = plane | window | {"groups": [1], "activation": [1]}
    linear = {"constants": {"weight": constant(8, 96), "bias": constant(8)}}
    return [
        ({"op": "conv", "inputs": [x, (2, 0, 8, 12, 12)], "output": y, "ints": conv_ints, "in_site": 0, "branches": [1], **conv}, [8, 1]),
        ({"op": "conv", "inputs": [x], "output": y, "ints": conv_ints, "in_site": 0, "out_site": 1, **conv}, [8, 8]),
        (
            {
                "op": "conv",
                "inputs": [x],
                "output": y,
                "ints": conv_ints | {"groups": [2]},
                "constants": {"weight": constant(8, 36), "bias": constant(8)},
                **gated,
            },
            [8],
        ),
        ({"op": "linear", "inputs": [x], "output": (1, 0, 8, 1, 1), "ints": {"in_features": [96], "out_features": [8]}, **linear}, []),
        (
            {
                "op": "linear",
                "inputs": [x],
                "output": (1, 0, 8, 1, 1),
                "ints": {"in_features": [96], "out_features": [8], "repeat": [12]},
                "in_site": 0,
                "out_site": 1,
                **linear,
            },
            [8, 8],
        ),
        (
            {
                "op": "depthwise",
                "inputs": [x],
                "output": y,
                "ints": plane | window,
                "constants": {"weight": constant(8, 9), "bias": constant(8)},
                **gated,
            },
            [8],
        ),
        ({"op": "pool", "inputs": [x], "output": y, "ints": plane | window | {"mode": [0]}, **gated}, [8]),
        ({"op": "pool", "inputs": [x], "output": y, "ints": plane | window | {"mode": [1], "count_include_pad": [0]}}, []),
        ({"op": "adaptive_pool", "inputs": [x], "output": y, "ints": plane | {"mode": [1]}, **gated}, [8]),
        ({"op": "mean", "inputs": [x], "output": (1, 0, 8, 1, 1), "ints": {"scatter": [1]}, "in_site": 0}, [8]),
        ({"op": "unary", "inputs": [x], "output": y, "ints": {"activation": [5]}, **gated}, [8]),
        (
            {
                "op": "affine",
                "inputs": [x],
                "output": y,
                "ints": {"activation": [1]},
                "constants": {"scale": constant(8), "shift": constant(8)},
                **gated,
                **clamp,
            },
            [8],
        ),
        ({"op": "binary", "inputs": [x, (2, 0, 8, 1, 1)], "output": y, "ints": {"kind": [2], "reverse": [0]}, **gated}, [8]),
        (
            {
                "op": "binary",
                "inputs": [x],
                "output": y,
                "ints": {"kind": [0], "handover": [0]},
                "constants": {"operand": constant(8, 1)},
                "branches": [0],
            },
            [1],
        ),
        (
            {
                "op": "layer_norm",
                "inputs": [x],
                "output": y,
                "ints": {"axis": [0]},
                "floats": {"eps": [1e-5]},
                "constants": {"weight": constant(8), "bias": constant(8)},
            },
            [],
        ),
        ({"op": "softmax", "inputs": [x], "output": y, "ints": {"axis": [1]}}, []),
        (
            {
                "op": "copy",
                "inputs": [(0, 0, 0, 0, 0)],
                "output": (1, 0, 0, 0, 0),
                "ints": {"sizes": [8, 12], "in_strides": [1, 8], "out_strides": [12, 1]},
            },
            [],
        ),
        ({"op": "fill", "output": (1, 0, 0, 0, 0), "ints": {"sizes": [8, 12], "out_strides": [12, 1]}, "floats": {"value": [1.0]}}, []),
    ]


def spoil(value, rng: random.Random):
    """Returns `value` with one thing somewhere inside it changed, removed or replaced by nonsense."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        changed = dict(value)
        if rng.random() < 0.15:
            del changed[key]
        else:
            changed[key] = spoil(value[key], rng)
        return changed
    if isinstance(value, (list, tuple)) and value and rng.random() < 0.9:
        changed = list(value)
        place = rng.randrange(len(changed))
        if rng.random() < 0.1:
            del changed[place]
        elif rng.random() < 0.1:
            changed.insert(place, rng.choice(ODD_INTS))
        else:
            changed[place] = spoil(changed[place], rng)
        return type(value)(changed)
    if isinstance(value, np.ndarray) and rng.random() < 0.9:
        spoiled = (value[:0], value[..., :-1].copy(), value.astype(np.float64), value.T, np.zeros((1, 1), np.float32), value[None])
        return rng.choice(spoiled)
    return rng.choice(ODD_INTS) if rng.random() < 0.8 else rng.choice(ODD_THINGS)


def run_spoiled_step(rng: random.Random, isa: str) -> bool:
    """Runs a good step with one fault or three; returns whether it was refused."""
    step, sites = copy.deepcopy(rng.choice(good_steps()))
    active = [[sorted(rng.sample(range(n), rng.randint(0, n)))] * 2 for n in sites]
    for _ in range(rng.choice((1, 1, 1, 3))):
        step = spoil(step, rng)
    if rng.random() < 0.2:
        sites = spoil(sites, rng)
    if rng.random() < 0.2:
        active = spoil(active, rng)
    buffers = [np.ones((2, 96), np.float32) for _ in range(3)]
    try:
        _C.StepRunner(isa, step, buffers, sites, active, rng.choice((1, 2)), None).run(1)
    except REFUSALS:
        return True
    return False


def good_plan() -> dict:
    """Returns a plan of a gate, a gated convolution and one that reads it, inside a branch that is handed over."""
    steps = [
        {"op": "mean", "inputs": [(0, 0, 8, 12, 12)], "output": (1, 0, 8, 1, 1), "ints": {}, "macs": 1},
        {"op": "gate", "inputs": [(1, 0, 8, 1, 1)], "ints": {"site": [0]}},
        {"op": "gate", "inputs": [(1, 0, 8, 1, 1)], "ints": {"site": [1]}, "branches": [0]},
    ]
    conv, both = copy.deepcopy(good_steps()[1][0]), copy.deepcopy(good_steps()[0][0])
    first = conv | {"inputs": [(0, 0, 8, 12, 12)], "output": (2, 0, 8, 12, 12), "in_site": -1, "out_site": 1, "branches": [0], "macs": 100}
    last = both | {"inputs": [(2, 0, 8, 12, 12), (0, 0, 8, 12, 12)], "output": (3, 0, 8, 12, 12), "in_site": 1, "branches": [0]}
    return {
        "arena_size": 256,
        "buffers": [("input", 96, 0), ("arena", 8, 0), ("arena", 96, 16), ("output", 96, 0)],
        "sites": [("branch", 1, 1), ("channels", 8, 2)],
        "steps": [*steps, first, last],
    }


def run_plan(spec: dict, rng: random.Random, spoiled: bool) -> bool:
    """Builds a plan, sets its gates and runs it; returns whether something was refused."""

    def maybe(value):
        return spoil(value, rng) if spoiled and rng.random() < 0.02 else value

    try:
        plan = _C.Plan(spec, _C.chosen_isa(), maybe(1))
        for site, groups in ((0, 1), (1, 4)):
            matrices = [maybe(m) for m in (constant(2, 8), constant(groups, 2), constant(groups), constant(5), constant(5))]
            plan.set_gate(maybe(site), *matrices)
        plan.set_compensation(maybe(4), maybe(constant(8, 8)))
        plan.set_costs(maybe([0.1] * 5), maybe([0.2] * 5))
        batch, sizes = maybe(3), [spec["buffers"][i][1] for i in (0, 3)]
        workspace = plan.acquire(batch)
        if batch * sum(sizes) > 1_000_000:  # addresses cannot be checked, so the memory behind them must be there
            return False
        x, y = (np.ones((batch, size), np.float32) for size in sizes)
        if rng.random() < 0.5:
            workspace.begin(maybe(0.5), maybe(0), maybe(1.0))
        else:
            workspace.begin_given(maybe([[[0], [], [0]], [[0, 2], [], [0, 1, 2, 3]]]))
        buffers = [(maybe(number), buffer.ctypes.data, buffer.shape[1], buffer) for number, buffer in ((0, x), (3, y))]
        if rng.random() < 0.5:
            plan.infer(batch, maybe(buffers), maybe(0.5), maybe(0), maybe(1.0), maybe(2))
        for buffer in buffers:
            workspace.bind(*buffer)
        workspace.run(maybe(0), maybe(5), maybe(2))
        workspace.executed(), workspace.step_ms(), workspace.overtaken(), plan.chunks(), plan.arena_bytes(1)
        workspace.active(maybe(1), maybe(2))
        plan.release(workspace)
        plan.trim()
    except REFUSALS:
        return True
    return False


def fuzz(what: str, seed: int, rounds: int) -> str:
    """Runs `rounds` spoiled steps or plans and returns how many were refused and how many ran."""
    rng = random.Random(seed)
    refused = 0
    for _ in range(rounds):
        if what == "steps":
            refused += run_spoiled_step(rng, _C.chosen_isa())
        else:
            spec = good_plan()
            if rng.random() < 0.7:
                for _ in range(rng.choice((1, 1, 1, 3))):
                    spec = spoil(spec, rng)
            refused += run_plan(spec if isinstance(spec, dict) else {}, rng, spoiled=True)
    return f"{refused} refused, {rounds - refused} ran"


@pytest.mark.parametrize("number", range(len(good_steps())))
def test_good_steps_run(number: int, isa: str) -> None:
    step, sites = good_steps()[number]
    buffers = [np.ones((2, 96), np.float32) for _ in range(3)]
    _C.StepRunner(isa, step, buffers, sites, [[list(range(n))] * 2 for n in sites], 2, None).run(2)
    assert np.isfinite(buffers[1]).all()


def test_a_good_plan_runs() -> None:
    for seed in range(4):
        assert not run_plan(good_plan(), random.Random(seed), spoiled=False)


def test_what_is_not_a_tensor_has_no_version() -> None:
    version = inspect.getattr_static(torch.Tensor, "_version")
    assert _C.version_sum((torch.ones(2).mul_(2), torch.nn.Parameter(torch.ones(3))), version) == 1
    for tensors, attribute in (((1,), version), ((torch.ones(2), object()), version), ((torch.ones(2),), 5), ((torch.ones(2),), int.real)):
        with pytest.raises(TypeError):
            _C.version_sum(tensors, attribute)


def test_tables_that_hold_the_same_again_are_unchanged() -> None:
    version, tensor, other = inspect.getattr_static(torch.Tensor, "_version"), torch.ones(2), torch.ones(2)
    tables = ({"weight": tensor}, {})
    known = (tables, _C.table_tags(tables), (tensor,), (tensor,), version, b"", 0)
    assert _C.unchanged(*known)
    tables[0]["weight"] = other
    assert not _C.unchanged(*known)
    tables[0]["weight"] = tensor
    assert _C.unchanged(*known)
    tables[1]["bias"] = other
    assert not _C.unchanged(*known)
    del tables[1]["bias"]
    assert _C.unchanged(*known)
    tensor.mul_(2)
    assert not _C.unchanged(*known)
    with pytest.raises(TypeError, match="dicts"):
        _C.table_tags((5,))


@pytest.mark.parametrize("what", ("steps", "plans"))
def test_wrong_descriptions_are_refused_without_harm(what: str) -> None:
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_bindings as t; print(t.fuzz({what!r}, 0, 1000))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"the process died with {result.returncode}: {result.stderr[-2000:]}"
    refused, _, rest = result.stdout.partition(" refused, ")
    assert int(refused) > 300 and int(rest.split()[0]) > 20, result.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": [(9, 0, 8, 12, 12)]}, "buffer 9 of 3"),
        ({"inputs": [(0, 0, 8, 13, 12)]}, "elements in a buffer of 96"),
        ({"inputs": [(0, -1, 8, 12, 12)]}, "negative"),
        ({"inputs": [(0, 0, 8, 12)]}, "got 4 values"),
        ({"in_site": 3}, "unknown site"),
        ({"branches": [7]}, "unknown branch"),
        ({"constants": {"weight": constant(8, 71), "bias": constant(8)}}, r"must be \[8, 72\], got \[8, 71\]"),
        ({"constants": {"weight": constant(8, 72).astype(np.float64), "bias": constant(8)}}, "float32"),
        ({"ints": {"in_size": [8, 3, 4], "out_size": [8, 3, 4], "kernel": [3, 2**20]}}, "too large"),
        ({"op": "convolve"}, "convolve"),
    ],
)
def test_refusals_name_the_fault(changes: dict, message: str) -> None:
    step, sites = good_steps()[1]
    buffers = [np.ones((1, 96), np.float32) for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        _C.StepRunner(_C.chosen_isa(), step | changes, buffers, sites, [[list(range(8))]] * 2, 1, None)


def test_rows_that_do_not_fit_their_site_are_refused() -> None:
    step, _ = good_steps()[1]
    buffers = [np.ones((1, 96), np.float32) for _ in range(3)]
    with pytest.raises(ValueError, match="8 rows, its site 64 channels"):
        _C.StepRunner(_C.chosen_isa(), step, buffers, [64, 8], [[list(range(64))], [list(range(8))]], 1, None)


@pytest.mark.parametrize("strides", ("in_strides", "out_strides"))
def test_a_copy_beyond_its_buffer_is_refused(strides: str) -> None:
    step, _ = good_steps()[-2]
    step["ints"][strides] = [13, 1]
    buffers = [np.ones((1, 96), np.float32) for _ in range(3)]
    with pytest.raises(ValueError, match="beyond its buffer of 96"):
        _C.StepRunner(_C.chosen_isa(), step, buffers, [], [], 1, None)


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="avx9"):
        _C.Plan(good_plan(), "avx9", 1)


def test_a_plan_needs_its_buffers_bound_before_it_runs() -> None:
    workspace = _C.Plan(good_plan(), _C.chosen_isa(), 1).acquire(1)
    workspace.begin(0.0)
    with pytest.raises(ValueError, match="bind every input and output"):
        workspace.run(0, 5, 1)


def test_the_stub_names_what_the_module_has() -> None:
    tree = ast.parse((Path(_C.__file__).parent / "_C.pyi").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {c.name: {m.name for m in c.body if isinstance(m, ast.FunctionDef)} for c in tree.body if isinstance(c, ast.ClassDef)}
    public = {name for name in vars(_C) if not name.startswith("_")}
    assert public == functions | set(classes)
    for name, methods in classes.items():
        assert {m for m in vars(getattr(_C, name)) if not m.startswith("_")} == methods - {"__init__"}, name
