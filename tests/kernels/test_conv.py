"""conv and linear steps against PyTorch: every instruction set, ragged shapes, any lists of input and output channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import LIST_KINDS, active_list, assert_close, run_step
from torch.nn import functional as F

# in_channels, out_channels, height, width, kernel, stride, padding (top, left, bottom, right), dilation, groups
SHAPES = {
    "1x1": (7, 13, 5, 9, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "1x1-lanes": (16, 24, 8, 16, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "3x3": (5, 11, 7, 7, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "3x3-14": (9, 26, 14, 14, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "3x3-wide": (3, 8, 5, 70, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "3x3-stride2": (6, 10, 13, 17, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
    "3x3-asymmetric": (4, 6, 8, 8, (3, 3), (2, 2), (0, 0, 1, 1), (1, 1), 1),
    "7x7-stem": (3, 9, 23, 25, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1), 1),
    "5x3-dilated": (4, 7, 12, 15, (5, 3), (1, 2), (2, 1, 2, 1), (2, 1), 1),
    "padding-wider-than-plane": (2, 3, 2, 2, (5, 5), (1, 1), (3, 4, 4, 3), (1, 1), 1),
    "grouped": (12, 18, 9, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3),
    "deep-reduction": (130, 5, 6, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "one-pixel": (9, 5, 1, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "1x1-long": (1100, 37, 3, 7, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
}
RELU = {"ints": {"activation": [1]}, "floats": {"activation": [0.0, float("inf")]}}


def conv_reference(x, weight, bias, shape):
    _, _, _, _, _, stride, (top, left, bottom, right), dilation, groups = shape
    return F.conv2d(F.pad(x.double(), (left, right, top, bottom)), weight.double(), bias.double(), stride, 0, dilation, groups).float()


def rounded(values):
    """Returns what bfloat16 keeps of `values`."""
    return values.bfloat16().float()


class ConvCase:
    """A conv step with random weights, inputs masked by lists, poisoned outputs, and what PyTorch makes of them.

    `zeros` is a function that puts zeros into the weight; the step then runs as a sparse one. With `bf16` it rounds weight and input.
    """

    def __init__(
        self, shape, batch, in_kind, out_kind, seed, residual=False, compensation=False, slack=0, zeros=None, bf16=False, phases=1
    ):
        channels, outputs, height, width, kernel, stride, padding, dilation, groups = shape
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.weight = torch.randn(outputs, channels // groups, *kernel)
        if zeros is not None:
            zeros(self.weight)
        self.bias = torch.randn(outputs)
        x = torch.randn(batch, channels, height, width)
        self.in_lists = None if in_kind is None else [active_list(in_kind, channels, rng) for _ in range(batch)]
        self.out_lists = None if out_kind is None else [active_list(out_kind, outputs, rng) for _ in range(batch)]
        masked = x.clone()
        if self.in_lists is not None:
            for sample, chosen in enumerate(self.in_lists):
                inactive = np.setdiff1d(np.arange(channels), chosen)
                masked[sample, inactive] = 0
        round_all = rounded if bf16 else lambda values: values
        self.want = conv_reference(round_all(masked), round_all(self.weight), self.bias, shape)
        positions = self.want[0, 0].numel()
        self.added = None
        if compensation:  # by the means of the inputs where the step's own weights say what these add
            means, of_own_weights = torch.randn(channels), kernel == (1, 1) and groups == 1 and zeros is None and phases == 1
            matrix = round_all(self.weight).flatten(1) * round_all(means) if of_own_weights else torch.randn(outputs, channels)
            self.added = (means if of_own_weights else matrix).numpy()
            for sample, chosen in enumerate(self.in_lists):
                inactive = np.setdiff1d(np.arange(channels), chosen)
                self.want[sample] += matrix[:, inactive].sum(1)[:, None, None]
        self.x = self._compact(x.flatten(2), self.in_lists, slack)
        self.y = np.full((batch, outputs * positions), np.nan, np.float32)
        self.buffers = [self.x, self.y]
        inputs = [(0, 0, channels, height * width, height * width)]
        if residual:
            extra = torch.randn_like(self.want)
            self.want = self.want + extra
            self.buffers.append(np.ascontiguousarray(extra.reshape(batch, -1).numpy()))
            inputs.append((2, 0, outputs, positions, positions))
        self.sites, self.active = [], []
        in_site = self._site(channels, self.in_lists)
        out_site = self._site(outputs, self.out_lists)
        self.step = {
            "op": "conv",
            "name": "case",
            "inputs": inputs,
            "output": (1, 0, outputs, positions, positions),
            "ints": {
                "in_size": [channels, height, width],
                "out_size": list(self.want.shape[1:]),
                "kernel": list(kernel),
                "stride": list(stride),
                "padding": list(padding),
                "dilation": list(dilation),
                "groups": [groups],
                "sparse": [int(zeros is not None)],
                "bf16": [int(bf16)],
                "phases": [phases],
                **({"winograd": [0]} if bf16 else {}),
                **RELU["ints"],
            },
            "floats": RELU["floats"],
            "constants": {"weight": self.weight.reshape(outputs, -1).numpy(), "bias": self.bias.numpy()},
            "in_site": in_site,
            "out_site": out_site,
        }

    def _site(self, channels, lists):
        if lists is None:
            return -1
        self.sites.append(channels)
        self.active.append(lists)
        return len(self.sites) - 1

    @staticmethod
    def _compact(x, lists, slack):
        buffer = np.full((x.shape[0], x.shape[1] * x.shape[2] + slack), np.nan, np.float32)
        for sample in range(x.shape[0]):
            rows = x[sample] if lists is None else x[sample, torch.as_tensor(lists[sample], dtype=torch.long)]
            buffer[sample, : rows.numel()] = rows.reshape(-1).numpy()
        return buffer

    def check(self, isa, num_threads=1):
        run_step(isa, self.step, self.buffers, sites=self.sites, active=self.active, num_threads=num_threads, compensation=self.added)
        want = self.want.relu().flatten(2)
        positions = want.shape[2]
        for sample in range(want.shape[0]):
            rows = want[sample] if self.out_lists is None else want[sample, torch.as_tensor(self.out_lists[sample], dtype=torch.long)]
            got = torch.from_numpy(self.y[sample])
            assert_close(got[: rows.numel()].view(-1, positions), rows, context=f"sample {sample}")
            assert got[rows.numel() :].isnan().all(), f"sample {sample}: wrote past the active rows"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_dense_equals_pytorch(isa, shape, batch):
    ConvCase(shape, batch, None, None, seed=batch).check(isa)


@pytest.mark.parametrize("out_kind", [None, *LIST_KINDS], ids=lambda kind: f"out-{kind}")
@pytest.mark.parametrize("in_kind", [None, *LIST_KINDS], ids=lambda kind: f"in-{kind}")
@pytest.mark.parametrize("name", ["1x1", "3x3-14", "3x3-stride2", "grouped", "deep-reduction"])
def test_lists_equal_masked_pytorch(isa, name, in_kind, out_kind):
    ConvCase(SHAPES[name], 2, in_kind, out_kind, seed=5).check(isa)


@pytest.mark.parametrize("in_kind", [None, "random"])
def test_residual_is_added_before_the_activation(isa, in_kind):
    ConvCase(SHAPES["3x3-14"], 2, in_kind, None, seed=7, residual=True).check(isa)


@pytest.mark.parametrize("name", ["1x1", "1x1-lanes", "1x1-long", "one-pixel", "3x3-14", "grouped"])
@pytest.mark.parametrize("in_kind", LIST_KINDS)
@pytest.mark.parametrize("out_kind", [None, "random"])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_compensation_adds_the_inactive_columns(isa, name, in_kind, out_kind, num_threads):
    ConvCase(SHAPES[name], 2, in_kind, out_kind, seed=9, compensation=True).check(isa, num_threads)


@pytest.mark.parametrize("in_kind", LIST_KINDS)
def test_a_layer_of_several_phases_is_compensated_by_a_matrix(isa, in_kind):
    ConvCase(SHAPES["1x1"], 2, in_kind, None, seed=9, compensation=True, phases=4).check(isa)


@pytest.mark.parametrize("out_kind", [None, "all", "random"])
@pytest.mark.parametrize("in_kind", [None, "random"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_without_packed_weights(isa, shape, in_kind, out_kind):
    case = ConvCase(shape, 2, in_kind, out_kind, seed=17)
    case.step["ints"] |= {"winograd": [0], "packed": [0]}
    case.check(isa)


@pytest.mark.parametrize("out_kind", [None, "random"])
@pytest.mark.parametrize("in_kind", [None, *LIST_KINDS])
@pytest.mark.parametrize("name", ["1x1", "1x1-lanes", "one-pixel"])
def test_planes_read_in_place(isa, name, in_kind, out_kind):
    """With room behind the input, 1x1 convolutions read whole tiles straight from the planes; what lies behind is NaN here."""
    ConvCase(SHAPES[name], 3, in_kind, out_kind, seed=13, slack=256).check(isa)


def pointwise(channels, outputs, height, width, stride=1):
    return (channels, outputs, height, width, (1, 1), (stride, stride), (0, 0, 0, 0), (1, 1), 1)


# Planes whose last vector would hold 1 to 5 positions: those are multiplied with rows in the lanes, up to four packed tiles of 16 at once.
@pytest.mark.parametrize("out_kind", [None, "most", "random"])
@pytest.mark.parametrize("in_kind", [None, "most"])
@pytest.mark.parametrize("outputs", [15, 64, 97])
@pytest.mark.parametrize("height,width", [(1, 17), (2, 9), (1, 19), (14, 14), (1, 197)], ids=lambda size: str(size))
def test_positions_beside_whole_vectors(isa, height, width, outputs, in_kind, out_kind):
    ConvCase(pointwise(9, outputs, height, width), 2, in_kind, out_kind, seed=21, residual=out_kind is None).check(isa)


@pytest.mark.parametrize("out_kind", [None, "most"])
def test_positions_beside_whole_vectors_over_blocks_of_the_reduction(isa, out_kind):
    """1100 inputs are three blocks; the second and third add to what the first left."""
    ConvCase(pointwise(1100, 40, 7, 7), 1, "most", out_kind, seed=22).check(isa)


@pytest.mark.parametrize("in_kind", [None, "random"])
@pytest.mark.parametrize(
    "shape",
    [
        pointwise(5, 20, 14, 14, stride=2),
        pointwise(5, 20, 56, 56, stride=2),
        pointwise(4, 18, 41, 23, stride=3),
        (4, 18, 28, 28, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
        (4, 18, 14, 14, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
        (4, 18, 56, 56, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
        (3, 18, 64, 64, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1), 1),
        (3, 18, 25, 90, (5, 5), (2, 2), (2, 2, 2, 2), (2, 2), 1),
        (3, 18, 40, 40, (3, 3), (5, 9), (1, 1, 1, 1), (1, 1), 1),
        (3, 18, 30, 200, (3, 3), (1, 2), (1, 1, 1, 1), (1, 1), 1),
    ],
    ids=lambda shape: f"{shape[4][0]}x{shape[4][1]}-{shape[2]}x{shape[3]}-stride{shape[5][0]}x{shape[5][1]}",
)
def test_strided_patches_are_gathered(isa, shape, in_kind):
    """With room behind the input, patches of strided layers are permuted out of whole registers; what lies behind is NaN here."""
    ConvCase(shape, 2, in_kind, None, seed=23, slack=256).check(isa)


@pytest.mark.parametrize("out_kind", [None, "most", "random"])
@pytest.mark.parametrize("groups,outputs", [(3, 15), (2, 32), (4, 68)])
def test_groups_have_packed_tiles_of_their_own(isa, groups, outputs, out_kind):
    shape = (12, outputs, 7, 7, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), groups)
    ConvCase(shape, 2, "most", out_kind, seed=24).check(isa)


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("in_kind", [None, "random"])
def test_threads_do_not_change_the_result(isa, num_threads, in_kind):
    shape = (64, 96, 28, 28, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    ConvCase(shape, 2, in_kind, in_kind, seed=11).check(isa, num_threads)


def linear_case(
    isa,
    features,
    outputs,
    in_kind,
    out_kind,
    *,
    repeat=1,
    batch=2,
    compensation=False,
    num_threads=1,
    zeros=None,
    whole_input=False,
    bf16=False,
):
    rng = np.random.default_rng(3)
    torch.manual_seed(3)
    channels = features // repeat
    weight, bias, x = torch.randn(outputs, features), torch.randn(outputs), torch.randn(batch, features)
    if zeros is not None:
        zeros(weight)
    kept = rounded(weight) if bf16 else weight
    in_lists = None if in_kind is None else [active_list(in_kind, channels, rng) for _ in range(batch)]
    out_lists = None if out_kind is None else [active_list(out_kind, outputs, rng) for _ in range(batch)]
    means = torch.randn(channels)
    buffer = np.full((batch, features), np.nan, np.float32)
    want = []
    for sample in range(batch):
        chosen = np.arange(channels) if in_lists is None else in_lists[sample]
        columns = (np.asarray(chosen, dtype=np.int64)[:, None] * repeat + np.arange(repeat)).reshape(-1)
        buffer[sample, columns if whole_input else slice(len(columns))] = x[sample, columns].numpy()
        y = (kept[:, columns].double() @ x[sample, columns].double()).float() + bias
        if compensation:
            mean_input = means.repeat_interleave(repeat)
            mean_input[columns] = 0
            y += (kept.double() @ mean_input.double()).float()
        want.append(y.tanh())
    y = np.full((batch, outputs), np.nan, np.float32)
    sites, active = [], []
    for lists, size in ((in_lists, channels), (out_lists, outputs)):
        if lists is not None:
            sites.append(size)
            active.append(lists)
    step = {
        "op": "linear",
        "name": "case",
        "inputs": [(0, 0, channels, repeat, repeat)],
        "output": (1, 0, outputs, 1, 1),
        "ints": {
            "in_features": [features],
            "out_features": [outputs],
            "repeat": [repeat],
            "sparse": [int(zeros is not None)],
            "whole_input": [int(whole_input)],
            "bf16": [int(bf16)],
            "activation": [8],
        },
        "constants": {"weight": weight.numpy(), "bias": bias.numpy()},
        "in_site": -1 if in_lists is None else 0,
        "out_site": -1 if out_lists is None else len(sites) - 1,
    }
    extra = means.numpy() if compensation else None
    run_step(isa, step, [buffer, y], sites=sites, active=active, num_threads=num_threads, compensation=extra)
    for sample in range(batch):
        rows = want[sample] if out_lists is None else want[sample][np.asarray(out_lists[sample], dtype=np.int64)]
        assert_close(y[sample, : len(rows)], rows, context=f"sample {sample}")
        assert np.isnan(y[sample, len(rows) :]).all()


@pytest.mark.parametrize("out_kind", [None, *LIST_KINDS], ids=lambda kind: f"out-{kind}")
@pytest.mark.parametrize("in_kind", [None, *LIST_KINDS], ids=lambda kind: f"in-{kind}")
@pytest.mark.parametrize("features,outputs", [(1, 1), (17, 33), (64, 300)])
def test_linear_equals_pytorch(isa, features, outputs, in_kind, out_kind):
    linear_case(isa, features, outputs, in_kind, out_kind)


@pytest.mark.parametrize("in_kind", LIST_KINDS)
@pytest.mark.parametrize("options", [{}, {"compensation": True}, {"num_threads": 3}], ids=["plain", "compensated", "threads"])
def test_linear_of_an_input_that_is_there_as_a_whole(isa, in_kind, options):
    linear_case(isa, 70, 300, in_kind, None, whole_input=True, **options)


@pytest.mark.parametrize("in_kind", [None, *LIST_KINDS])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_linear_after_flatten(isa, in_kind, num_threads):
    linear_case(isa, 6 * 49, 500, in_kind, "random", repeat=49, num_threads=num_threads)


@pytest.mark.parametrize("outputs", [1100, 4200])
@pytest.mark.parametrize("out_kind", [None, "random"])
@pytest.mark.parametrize("in_kind", LIST_KINDS)
def test_linear_with_many_outputs(isa, in_kind, out_kind, outputs):
    linear_case(isa, 150, outputs, in_kind, out_kind, num_threads=3)


@pytest.mark.parametrize("repeat", [1, 5])
@pytest.mark.parametrize("in_kind", LIST_KINDS)
def test_linear_compensation(isa, in_kind, repeat):
    linear_case(isa, 40, 70, in_kind, None, repeat=repeat, compensation=True)


def test_a_step_that_does_not_fit_is_refused_by_name(isa):
    case = ConvCase(SHAPES["1x1"], 1, None, None, seed=1)
    case.step["constants"]["weight"] = np.zeros((13, 8), np.float32)
    with pytest.raises(ValueError, match=r"step 'case' \(conv\): constant 'weight' must be \[13, 7\], got \[13, 8\]"):
        case.check(isa)
    case = ConvCase(SHAPES["1x1"], 1, None, None, seed=1)
    case.step["output"] = (1, 8, 13, 45, 45)
    with pytest.raises(ValueError, match=r"operand of .* elements in a buffer of"):
        case.check(isa)
