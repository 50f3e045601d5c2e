"""conv and linear steps in bfloat16 against PyTorch on rounded values: every instruction set, ragged shapes, any lists."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ISAS
from helpers import LIST_KINDS
from test_bottleneck import GATED, PARTS, Block, check_gated, check_whole
from test_bottleneck import SHAPES as BLOCK_SHAPES
from test_bottleneck import run as run_block
from test_bottleneck import shape_id as block_id
from test_conv import SHAPES, ConvCase, linear_case

from dynprune.runtime import _C


@pytest.fixture(params=[*ISAS, "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set that this machine runs, with the one whose products are in bfloat16."""
    if request.param not in _C.available_isas():
        pytest.skip(f"this machine does not run {request.param}")
    return request.param


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_dense_equals_pytorch(isa, shape, batch):
    ConvCase(shape, batch, None, None, seed=batch, bf16=True).check(isa)


@pytest.mark.parametrize("out_kind", [None, *LIST_KINDS], ids=lambda kind: f"out-{kind}")
@pytest.mark.parametrize("in_kind", LIST_KINDS, ids=lambda kind: f"in-{kind}")
@pytest.mark.parametrize("name", ["1x1", "3x3", "3x3-stride2", "grouped", "deep-reduction"])
def test_lists_equal_masked_pytorch(isa, name, in_kind, out_kind):
    ConvCase(SHAPES[name], 2, in_kind, out_kind, seed=5, bf16=True).check(isa)


def test_a_reduction_of_several_blocks_with_a_residual(isa):
    shape = (1101, 40, 7, 7, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    ConvCase(shape, 1, "most", None, seed=3, residual=True, bf16=True).check(isa)
    ConvCase(shape, 1, None, None, seed=3, residual=True, bf16=True).check(isa)


def test_columns_further_apart_than_the_kernel_keeps_as_bits(isa):
    case = ConvCase((40_000, 9, 2, 3, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1), 1, "few", None, seed=4, bf16=True)
    case.check(isa)


@pytest.mark.parametrize("in_kind", [None, "random"])
def test_planes_read_in_place(isa, in_kind):
    ConvCase((33, 20, 8, 16, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1), 3, in_kind, in_kind, seed=13, slack=256, bf16=True).check(isa)


@pytest.mark.parametrize("name", ["1x1", "1x1-long", "one-pixel"])
@pytest.mark.parametrize("in_kind", LIST_KINDS)
@pytest.mark.parametrize("out_kind", [None, "random"])
def test_compensation_by_means(isa, name, in_kind, out_kind):
    ConvCase(SHAPES[name], 2, in_kind, out_kind, seed=9, compensation=True, bf16=True).check(isa)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_do_not_change_the_result(isa, num_threads):
    shape = (64, 96, 28, 28, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    ConvCase(shape, 2, "random", "random", seed=11, compensation=True, bf16=True).check(isa, num_threads)


@pytest.mark.parametrize("out_kind", [None, *LIST_KINDS], ids=lambda kind: f"out-{kind}")
@pytest.mark.parametrize("in_kind", [None, *LIST_KINDS], ids=lambda kind: f"in-{kind}")
@pytest.mark.parametrize("features,outputs", [(1, 1), (17, 33), (64, 300)])
def test_linear_equals_pytorch(isa, features, outputs, in_kind, out_kind):
    linear_case(isa, features, outputs, in_kind, out_kind, bf16=True)


def test_linear_with_many_outputs_and_compensation(isa):
    linear_case(isa, 150, 4200, "random", None, num_threads=3, compensation=True, bf16=True)
    linear_case(isa, 6 * 49, 500, "random", "random", repeat=49, bf16=True)


@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=block_id)
@pytest.mark.parametrize("parts", PARTS)
def test_fused_blocks_equal_torch(isa, shape, parts):
    check_whole(isa, Block(shape, parts, bf16=True))


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize("parts", PARTS)
def test_fused_blocks_with_lists(isa, kind, parts):
    check_gated(isa, Block(GATED, parts, bf16=True), kind)


@pytest.mark.parametrize("parts", PARTS)
def test_fused_blocks_round_as_their_parts_do(isa, parts):
    block = Block((24, 72, 20, 28, 28, 3, 1, 1), parts, inner=(5, 0.0, 0.0), bf16=True)
    for name in ("expand", "depthwise", "project"):
        weight, bias = getattr(block, name)
        setattr(block, name, (block.rng.standard_normal(weight.shape, dtype=np.float32) / np.float32(4), bias))
    x = block.rng.standard_normal((1, block.first, 28, 28), dtype=np.float32)
    fused = run_block(isa, block, block.spec(fused=True), [x])
    apart = run_block(isa, block, block.spec(fused=False), [x], must_fuse=False)
    error, scale = np.abs(fused - apart), np.abs(apart).max()
    # Sums in another order are now and then rounded to the other neighbour.
    assert error.max() < 2e-3 * scale and np.median(error) < 1e-6 * scale


def test_a_nan_stays_a_nan_and_the_largest_values_become_infinite(isa):
    case = ConvCase(SHAPES["one-pixel"], 1, None, None, seed=1, bf16=True)
    case.step["ints"]["activation"] = [0]
    case.x[0, 0] = np.nan
    case.want[:] = np.nan
    case.check(isa)
    case = ConvCase(SHAPES["one-pixel"], 1, None, None, seed=1, bf16=True)
    case.weight[:] = 1
    case.x[0] = 0
    case.x[0, 0] = np.finfo(np.float32).max
    case.want[:] = np.inf
    case.check(isa)


def test_sparse_and_bf16_exclude_each_other(isa):
    case = ConvCase(SHAPES["1x1"], 1, None, None, seed=1, bf16=True)
    case.step["ints"]["sparse"] = [1]
    with pytest.raises(ValueError, match="'sparse' and 'bf16' exclude each other"):
        case.check(isa)
