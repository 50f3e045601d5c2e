"""Stride arithmetic, against what torch does with the same strides."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynprune.runtime import views
from dynprune.runtime.plan import Rows, View


def view_of(tensor: torch.Tensor, batch_dim: int = 0) -> View:
    return View(0, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), batch_dim)


def tensor_of(view: View, memory: torch.Tensor) -> torch.Tensor:
    return memory.as_strided(view.sizes, view.strides, view.offset)


@st.composite
def shuffled_views(draw):
    """A permuted, possibly sliced view of fresh memory."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    tensor = torch.arange(float(torch.Size(sizes).numel())).reshape(sizes)
    tensor = tensor.permute(draw(st.permutations(range(len(sizes)))))
    if draw(st.booleans()):
        dim = draw(st.integers(0, len(sizes) - 1))
        start = draw(st.integers(0, tensor.shape[dim] - 1))
        tensor = tensor.narrow(dim, start, tensor.shape[dim] - start)
    return tensor


def factorisations(n: int) -> list[tuple[int, ...]]:
    return [sizes for rank in (1, 2, 3) for sizes in itertools.product([d for d in range(1, n + 1) if n % d == 0], repeat=rank)
            if torch.Size(sizes).numel() == n]  # fmt: skip


@given(shuffled_views(), st.data())
def test_reshape_agrees_with_torch(tensor, data):
    sizes = data.draw(st.sampled_from(factorisations(tensor.numel())))
    strides = views.reshape_strides(tuple(tensor.shape), tuple(tensor.stride()), sizes)
    try:
        want = tensor.view(sizes)
    except RuntimeError:
        assert strides is None
        return
    memory = torch.arange(2000.0)
    got = memory.as_strided(sizes, strides, tensor.storage_offset())
    assert torch.equal(got, memory.as_strided(want.size(), want.stride(), want.storage_offset()))


@given(shuffled_views())
def test_rows_cover_the_view(tensor):
    view, memory = view_of(tensor), torch.arange(2000.0)
    for row_dim in range(tensor.ndim):
        rows = views.as_rows(view, row_dim)
        if rows is not None:
            want = tensor_of(view, memory).movedim(row_dim, 0).reshape(view.sizes[row_dim], -1)
            assert torch.equal(memory.as_strided((rows.rows, rows.positions), (rows.row_stride, 1), rows.offset), want)


@given(shuffled_views())
def test_memory_rows_hold_every_element_once(tensor):
    view, memory = view_of(tensor), torch.arange(2000.0)
    rows = views.memory_rows(view)
    if rows is not None:
        got = memory.as_strided((rows.rows, rows.positions), (rows.row_stride, 1), rows.offset)
        assert sorted(got.flatten().tolist()) == sorted(tensor_of(view, memory).flatten().tolist())


@given(shuffled_views(), shuffled_views())
def test_simplified_visits_the_same_pairs(a, b):
    if a.shape != b.shape:
        b = torch.empty(a.shape)
    sizes, (first, second) = views.simplified(a.shape, a.stride(), b.stride())
    memory = torch.arange(2000)

    def addresses(shape, *strides):
        return list(zip(*(memory.as_strided(shape, stride).flatten().tolist() for stride in strides), strict=True))

    assert addresses(a.shape, a.stride(), b.stride()) == addresses(sizes, first, second)
    assert len(sizes) <= max(a.ndim, 1)


@pytest.mark.parametrize(
    ("sizes", "strides", "row_dim", "rows"),
    [
        pytest.param((8, 3, 5), (15, 5, 1), 0, Rows(0, 0, 8, 15, 15), id="planes"),
        pytest.param((7, 8), (1, 7), 1, Rows(0, 0, 8, 7, 7), id="tokens"),
        pytest.param((7, 8), (8, 1), 1, None, id="channels-last"),
        pytest.param((8, 3, 4), (15, 5, 1), 0, None, id="gap-inside-rows"),
        pytest.param((8, 2, 5), (15, 5, 1), 0, Rows(0, 0, 8, 15, 10), id="gap-between-rows"),
        pytest.param((8, 1, 1), (1, 1, 1), 0, Rows(0, 0, 8, 1, 1), id="one-position"),
        pytest.param((1, 3, 5), (99, 5, 1), 0, Rows(0, 0, 1, 15, 15), id="one-row"),
        pytest.param((8, 5), (0, 1), 0, None, id="repeated-row"),
    ],
)
def test_as_rows(sizes, strides, row_dim, rows):
    assert views.as_rows(View(0, 0, sizes, strides), row_dim) == rows


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        pytest.param((4, 2, 3), Rows(0, 0, 4, 6, 6), id="full"),
        pytest.param((4, 1, 1), Rows(0, 0, 4, 1, 1), id="one-per-row"),
        pytest.param((1, 2, 3), Rows(0, 0, 4, 0, 6), id="one-row"),
        pytest.param((1, 1, 1), Rows(0, 0, 4, 0, 1), id="scalar"),
        pytest.param((4, 1, 3), None, id="neither"),
    ],
)
def test_rows_like_of_a_broadcast_operand(sizes, rows):
    view = views.expanded(View(0, 0, sizes, views.dense_strides(sizes)), (4, 2, 3))
    assert views.rows_like(view, (0, 1, 2)) == rows


def test_expand_refuses_what_does_not_broadcast():
    assert views.expanded(View(0, 0, (3,), (1,)), (2, 4)) is None
    assert views.expanded(View(0, 0, (2, 3), (3, 1)), (3,)) is None


def test_slice_and_permute_keep_the_elements():
    tensor = torch.arange(60.0).reshape(3, 4, 5)
    view = views.sliced(views.permuted(view_of(tensor), (2, 0, 1)), 0, 1, 2, 2)
    assert torch.equal(tensor_of(view, tensor.flatten()), tensor.permute(2, 0, 1)[1:5:2])
    assert views.span(replace(view, offset=0)) == 1 + 2 + 2 * 20 + 3 * 5
