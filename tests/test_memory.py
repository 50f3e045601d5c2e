"""Placing buffers: values alive together never overlap, and memory is used again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynprune.runtime.memory import ALIGNMENT, SLACK, place_buffers

_BUFFERS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 12), st.integers(0, 12)), max_size=14)


@given(_BUFFERS)
def test_buffers_alive_together_do_not_overlap(items):
    sizes = [size for size, _, _ in items]
    lifetimes = [(min(a, b), max(a, b)) for _, a, b in items]
    offsets, arena_size = place_buffers(sizes, lifetimes)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert arena_size % ALIGNMENT == 0
    assert all(offset + size + SLACK <= arena_size for offset, size in zip(offsets, sizes, strict=True))
    for i in range(len(items)):
        for j in range(i):
            together = lifetimes[i][0] <= lifetimes[j][1] and lifetimes[j][0] <= lifetimes[i][1]
            apart = offsets[i] + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= offsets[i]
            assert apart or not together


@pytest.mark.parametrize(
    ("sizes", "lifetimes", "arena"),
    [
        pytest.param([], [], SLACK, id="nothing"),
        pytest.param([64] * 10, [(i, i + 1) for i in range(10)], 128 + SLACK, id="chain-needs-two"),
        pytest.param([64, 32, 32], [(0, 1), (2, 3), (2, 3)], 64 + SLACK, id="two-in-the-place-of-one"),
        pytest.param([16, 16, 16], [(0, 9), (0, 9), (0, 9)], 48 + SLACK, id="all-together"),
        pytest.param([1, 1], [(0, 1), (0, 1)], 32 + SLACK, id="padded-to-a-line"),
    ],
)
def test_arena_size(sizes, lifetimes, arena):
    assert place_buffers(sizes, lifetimes)[1] == arena


def test_a_buffer_takes_the_tightest_gap():
    # at step 1 the second and fourth remain, and leave gaps of 112 in front and of 80 between them
    offsets, _ = place_buffers([112, 96, 80, 64, 48], [(0, 0), (0, 1), (0, 0), (0, 1), (1, 1)])
    assert offsets == [0, 112, 208, 288, 208]
