"""3x3 convolutions by Winograd against a direct convolution in double precision: ragged planes, any lists, and the bound of the error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import LIST_KINDS, active_list, run_step
from torch.nn import functional as F

from dynprune.runtime import _C

BOUND = {2: 2e-6, 4: 1e-5}
"""Largest error allowed for normal random data of up to 512 input channels, relative to the largest magnitude of the outputs."""

TILES = pytest.mark.parametrize("tile", BOUND, ids=lambda tile: f"f{tile}x{tile}")

# in_channels, out_channels, height, width, padding (top, left, bottom, right)
SHAPES = {
    "14x14": (9, 26, 14, 14, (1, 1, 1, 1)),
    "28x28": (6, 70, 28, 28, (1, 1, 1, 1)),
    "56x56": (3, 5, 56, 56, (1, 1, 1, 1)),
    "7x7": (17, 25, 7, 7, (1, 1, 1, 1)),
    "13x9": (5, 11, 13, 9, (1, 1, 1, 1)),
    "5x30": (4, 7, 5, 30, (1, 1, 1, 1)),
    "30x5": (4, 7, 30, 5, (1, 1, 1, 1)),
    "unpadded": (3, 6, 11, 17, (0, 0, 0, 0)),
    "padding2": (3, 6, 8, 8, (2, 2, 2, 2)),
    "asymmetric": (3, 6, 8, 10, (0, 1, 2, 0)),
    "one-output": (4, 3, 3, 3, (0, 0, 0, 0)),
    "one-input": (4, 3, 1, 1, (1, 1, 1, 1)),
    "wider-than-a-group": (2, 3, 6, 150, (1, 1, 1, 1)),
}


class Case:
    """A conv step forced to one tile, with random data, inputs masked by lists and poisoned outputs; `want` holds the exact result."""

    def __init__(self, tile, shape, *, batch=1, in_kind=None, out_kind=None, residual=False, compensation=False):
        channels, outputs, height, width, padding = shape
        rng = np.random.default_rng(11)
        x = rng.standard_normal((batch, channels, height, width)).astype(np.float32)
        weight = rng.standard_normal((outputs, channels, 3, 3)).astype(np.float32)
        bias = rng.standard_normal(outputs).astype(np.float32)
        self.tile = tile
        self.in_lists = None if in_kind is None else [active_list(in_kind, channels, rng) for _ in range(batch)]
        self.out_lists = None if out_kind is None else [active_list(out_kind, outputs, rng) for _ in range(batch)]
        off = np.ones((batch, channels), bool)
        for n in range(batch):
            off[n, slice(None) if self.in_lists is None else self.in_lists[n]] = False
        top, left, bottom, right = padding
        padded = F.pad(torch.from_numpy(np.where(off[..., None, None], 0, x)).double(), (left, right, top, bottom))
        self.want = F.conv2d(padded, torch.from_numpy(weight).double(), torch.from_numpy(bias).double()).numpy()
        out_height, out_width = self.want.shape[2:]
        positions = out_height * out_width
        self.matrix = None
        if compensation:
            self.matrix = rng.standard_normal((outputs, channels)).astype(np.float32)
            self.want += (off @ self.matrix.T.astype(np.float64))[..., None, None]
        compact = np.full((batch, channels * height * width), np.nan, np.float32)
        for n in range(batch):
            rows = x[n] if self.in_lists is None else x[n, self.in_lists[n]]
            compact[n, : rows.size] = rows.reshape(-1)
        self.y = np.full((batch, outputs * positions), np.nan, np.float32)
        self.buffers = [compact, self.y]
        inputs = [(0, 0, channels, height * width, height * width)]
        if residual:
            self.residual = rng.standard_normal(self.want.shape).astype(np.float32)
            self.want += self.residual
            self.buffers.append(self.residual.reshape(batch, -1))
            inputs.append((2, 0, outputs, positions, positions))
        self.scale = np.abs(self.want).max()
        self.sites, self.active = [], []
        self.step = {
            "op": "conv",
            "name": "case",
            "inputs": inputs,
            "output": (1, 0, outputs, positions, positions),
            "ints": {
                "in_size": [channels, height, width],
                "out_size": [outputs, out_height, out_width],
                "kernel": [3, 3],
                "padding": list(padding),
                "winograd": [tile],
            },
            "floats": {},
            "constants": {"weight": weight.reshape(outputs, -1), "bias": bias},
            "in_site": self._site(channels, self.in_lists),
            "out_site": self._site(outputs, self.out_lists),
        }

    def _site(self, channels, lists):
        if lists is None:
            return -1
        self.sites.append(channels)
        self.active.append(lists)
        return len(self.sites) - 1

    def run(self, isa, num_threads=1):
        run_step(isa, self.step, self.buffers, sites=self.sites, active=self.active, num_threads=num_threads, compensation=self.matrix)
        return self

    def check(self, isa, num_threads=1):
        self.run(isa, num_threads)
        for n, want in enumerate(self.want):
            rows = want if self.out_lists is None else want[self.out_lists[n]]
            assert np.isnan(self.y[n, rows.size :]).all(), f"sample {n}: wrote past the active rows"
            error = np.abs(self.y[n, : rows.size] - rows.reshape(-1)).max(initial=0)
            assert error <= BOUND[self.tile] * self.scale, f"sample {n}: error {error:.3g}, largest output {self.scale:.3g}"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@TILES
def test_equals_the_direct_convolution(isa, tile, shape, batch):
    Case(tile, shape, batch=batch).check(isa)


@pytest.mark.parametrize("out_kind", [None, *LIST_KINDS], ids=lambda kind: f"out-{kind}")
@pytest.mark.parametrize("in_kind", [None, *LIST_KINDS], ids=lambda kind: f"in-{kind}")
@pytest.mark.parametrize("name", ["14x14", "13x9"])
@TILES
def test_any_lists(isa, tile, name, in_kind, out_kind):
    Case(tile, SHAPES[name], batch=2, in_kind=in_kind, out_kind=out_kind).check(isa)


@pytest.mark.parametrize("in_kind", LIST_KINDS, ids=lambda kind: f"in-{kind}")
@pytest.mark.parametrize("out_kind", [None, "random"], ids=lambda kind: f"out-{kind}")
@TILES
def test_compensation_adds_the_inactive_columns(isa, tile, in_kind, out_kind):
    Case(tile, SHAPES["7x7"], batch=2, in_kind=in_kind, out_kind=out_kind, compensation=True).check(isa)


@pytest.mark.parametrize("in_kind", [None, "random"], ids=lambda kind: f"in-{kind}")
@pytest.mark.parametrize("name", ["28x28", "13x9", "wider-than-a-group"])
@TILES
def test_a_residual_is_added(isa, tile, name, in_kind):
    Case(tile, SHAPES[name], batch=2, in_kind=in_kind, residual=True).check(isa)


@TILES
def test_the_activation_comes_last(isa, tile):
    case = Case(tile, SHAPES["13x9"], residual=True)
    case.step["ints"]["activation"] = [1]
    case.step["floats"]["activation"] = [0.0, 2.0]
    case.want = case.want.clip(0.0, 2.0)
    case.check(isa)


@TILES
def test_a_branch_that_is_off_hands_over_the_residual(isa, tile):
    case = Case(tile, SHAPES["wider-than-a-group"], batch=3, residual=True)
    case.step["ints"]["activation"] = [1]
    case.step["floats"]["activation"] = [-0.5, 0.5]
    case.step["branches"] = [0]
    case.sites.append(1)
    case.active.append([[0], [], [0]])
    case.want[1] = case.residual[1]
    case.want = case.want.clip(-0.5, 0.5)
    case.check(isa)


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("kind", [None, "random"], ids=lambda kind: f"lists-{kind}")
@TILES
def test_threads_do_not_change_the_result(isa, tile, kind, num_threads):
    shape = (40, 200, 28, 28, (1, 1, 1, 1))
    alone = Case(tile, shape, batch=2, in_kind=kind, out_kind=kind).run(isa)
    Case(tile, shape, batch=2, in_kind=kind, out_kind=kind).check(isa, num_threads)
    shared = Case(tile, shape, batch=2, in_kind=kind, out_kind=kind).run(isa, num_threads)
    reference = np.nan_to_num(alone.y, nan=-1e30)
    assert np.abs(np.nan_to_num(shared.y, nan=-1e30) - reference).max() <= BOUND[tile] * alone.scale


@pytest.mark.parametrize("channels", [64, 512])
@TILES
def test_the_error_bound_holds_for_deep_reductions(isa, tile, channels):
    Case(tile, (channels, 16, 14, 14, (1, 1, 1, 1))).check(isa)


@TILES
def test_it_is_not_the_direct_convolution(isa, tile):
    shape = SHAPES["14x14"]
    assert not np.array_equal(Case(tile, shape).run(isa).y, Case(0, shape).run(isa).y)


# The tile of each of ResNet's 3x3 layers of stride 1, and of layers that are better off with none, when the step does not ask for one.
@pytest.mark.parametrize(
    "shape,tile",
    [
        ((64, 64, 56, 56, (1, 1, 1, 1)), 4),
        ((128, 128, 28, 28, (1, 1, 1, 1)), 4),
        ((256, 256, 14, 14, (1, 1, 1, 1)), 2),
        ((256, 256, 7, 7, (1, 1, 1, 1)), 0),
        ((3, 64, 56, 56, (1, 1, 1, 1)), 0),
        ((256, 256, 3, 3, (1, 1, 1, 1)), 0),
    ],
    ids=lambda value: "x".join(map(str, value[:3])) if isinstance(value, tuple) else f"tile{value}",
)
def test_the_tile_is_chosen_by_shape(shape, tile):
    if "avx512" not in _C.available_isas():
        pytest.skip("the choice differs with the lanes; this machine does not run avx512")
    free = Case(tile, shape)
    del free.step["ints"]["winograd"]
    assert np.array_equal(free.run("avx512").y, Case(tile, shape).run("avx512").y)


def test_constant_images_of_powers_of_two_are_exact(isa):
    """F(2x2) with such data rounds nowhere, so that any wrong element of the transforms shows."""
    case = Case(2, SHAPES["13x9"])
    case.buffers[0][:] = 2.0
    case.step["constants"]["weight"][:] = 0.5
    case.step["constants"]["bias"][:] = 0.0
    taps = F.conv2d(torch.ones(1, 1, 13, 9), torch.ones(1, 1, 3, 3), padding=1).numpy().reshape(-1)
    case.run(isa)
    assert np.array_equal(case.y.reshape(11, -1), np.broadcast_to(5 * taps, (11, taps.size)))


@pytest.mark.parametrize("changed", [{"winograd": [3]}, {"stride": [2, 2], "out_size": [26, 7, 7]}, {"dilation": [2, 2]}], ids=str)
def test_what_it_is_not_for_is_refused(isa, changed):
    case = Case(4, SHAPES["14x14"])
    case.step["ints"].update(changed)
    with pytest.raises(ValueError, match=r"step 'case' \(conv\): 'winograd'"):
        case.run(isa)
