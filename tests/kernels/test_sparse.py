"""conv and linear steps with sparse weights against PyTorch: every instruction set, any lists, rows that share their zeros or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import LIST_KINDS
from test_conv import SHAPES, ConvCase, linear_case


def scattered(weight, density=0.15):
    weight *= torch.rand_like(weight) < density


def alike(weight):
    """Four rows each share their zeros, but for the second four, which do not."""
    keep = torch.rand(-(-len(weight) // 4), *weight.shape[1:]).repeat_interleave(4, 0)[: len(weight)] < 0.3
    keep[5:6] = torch.rand_like(weight[5:6]) < 0.3
    weight *= keep


def empty_rows(weight):
    scattered(weight)
    weight[::3] = 0


def nothing(weight):
    weight.zero_()


ZEROS = {"scattered": scattered, "alike": alike, "empty-rows": empty_rows, "nothing": nothing, "none": lambda weight: None}
NAMES = [name for name in SHAPES if name != "grouped"]


@pytest.mark.parametrize("zeros", ZEROS.values(), ids=ZEROS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_sparse_equals_pytorch(isa, name, zeros):
    ConvCase(SHAPES[name], 2, None, None, seed=1, zeros=zeros).check(isa)


@pytest.mark.parametrize("zeros", [scattered, alike], ids=["scattered", "alike"])
@pytest.mark.parametrize("out_kind", [None, *LIST_KINDS], ids=lambda kind: f"out-{kind}")
@pytest.mark.parametrize("in_kind", [None, *LIST_KINDS], ids=lambda kind: f"in-{kind}")
@pytest.mark.parametrize("name", ["3x3-14", "deep-reduction"])
def test_lists_equal_masked_pytorch(isa, name, in_kind, out_kind, zeros):
    ConvCase(SHAPES[name], 2, in_kind, out_kind, seed=5, zeros=zeros).check(isa)


@pytest.mark.parametrize("in_kind", [None, "random"])
def test_residual_and_compensation(isa, in_kind):
    ConvCase(SHAPES["3x3-14"], 2, in_kind, None, seed=7, residual=True, zeros=alike).check(isa)
    ConvCase(SHAPES["3x3-14"], 2, "random", in_kind, seed=9, compensation=True, zeros=alike).check(isa)


@pytest.mark.parametrize("in_kind", [None, *LIST_KINDS])
@pytest.mark.parametrize("name", ["1x1", "1x1-lanes", "one-pixel"])
def test_planes_read_in_place(isa, name, in_kind):
    ConvCase(SHAPES[name], 3, in_kind, "random", seed=13, slack=256, zeros=scattered).check(isa)


@pytest.mark.parametrize("in_kind", [None, "random"])
def test_threads_and_large_kernels(isa, in_kind):
    ConvCase((64, 96, 28, 28, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1), 2, in_kind, in_kind, seed=11, zeros=alike).check(isa, 3)
    ConvCase((3, 5, 24, 24, (21, 21), (1, 1), (10, 10, 10, 10), (1, 1), 1), 1, in_kind, None, seed=11, zeros=scattered).check(isa)


@pytest.mark.parametrize("zeros", ZEROS.values(), ids=ZEROS.keys())
@pytest.mark.parametrize("in_kind", [None, *LIST_KINDS], ids=lambda kind: f"in-{kind}")
@pytest.mark.parametrize("features,outputs", [(1, 1), (17, 33), (160, 300)])
def test_linear_equals_pytorch(isa, features, outputs, in_kind, zeros):
    linear_case(isa, features, outputs, in_kind, "random", zeros=zeros)
    linear_case(isa, features, outputs, in_kind, None, zeros=zeros)


@pytest.mark.parametrize("in_kind", LIST_KINDS)
def test_linear_after_flatten_and_compensated(isa, in_kind):
    linear_case(isa, 6 * 49, 500, in_kind, "random", repeat=49, num_threads=2, zeros=scattered)
    linear_case(isa, 40, 70, in_kind, None, compensation=True, zeros=scattered)
    linear_case(isa, 40, 70, in_kind, None, whole_input=True, zeros=scattered)


def test_groups_are_refused(isa):
    case = ConvCase(SHAPES["grouped"], 1, None, None, seed=1, zeros=lambda weight: None)
    with pytest.raises(ValueError, match=r"step 'case' \(conv\): 'sparse' needs one group"):
        case.check(isa)


def test_winograd_and_sparse_exclude_each_other(isa):
    case = ConvCase(SHAPES["3x3-14"], 1, None, None, seed=1, zeros=scattered)
    case.step["ints"]["winograd"] = [4]
    with pytest.raises(ValueError, match="'sparse' and 'winograd' exclude each other"):
        case.check(isa)


def test_nan_of_a_skipped_input_stays_out(isa):
    """Columns that are zero are not multiplied: a NaN there is not read, unlike in a dense product."""

    def first_only(weight):
        weight[:, 1:] = 0

    case = ConvCase(SHAPES["1x1"], 1, None, None, seed=1, zeros=first_only)
    case.x[:, 45:] = np.nan
    case.check(isa)
