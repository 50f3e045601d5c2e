"""Times single convolution steps of the engine against PyTorch's dense convolution, in turns, outputs checked.

    python bench/bench_kernels.py --shapes bench/shapes/resnet50.csv --keep 0.25,0.5,1 --threads 1

One line per shape and keep ratio; the lists of input and output channels are random. Where the input is the network's own
(3 channels) only the output is gated.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from dynprune.cli.bench import TOLERANCE, parse_keeps, positive_float, relative_error
from dynprune.cli.machine import describe_machine
from dynprune.cli.models import positive_int
from dynprune.cli.table import format_table
from dynprune.runtime import _C
from dynprune.runtime.engine import choose_isa
from dynprune.timing import measure_interleaved


@dataclass(frozen=True)
class Shape:
    """A row of a shapes file: a square convolution of one sample, and how often the model runs it."""

    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    groups: int
    count: int

    @property
    def depthwise(self) -> bool:
        """Whether each channel has its own kernel."""
        return self.groups == self.in_channels == self.out_channels

    def __str__(self) -> str:
        kind = "dw" if self.depthwise else f"g{self.groups}" if self.groups > 1 else ""
        channels = self.in_channels if self.depthwise else f"{self.in_channels}-{self.out_channels}"
        return f"{self.kernel}x{self.kernel}{kind}/{self.stride} {channels} {self.height}x{self.width}"


@dataclass(frozen=True)
class Row:
    """One measurement; GFLOP/s counts what was computed, effective GFLOP/s the whole convolution."""

    shape: str
    keep: float
    median_ms: float
    iqr_ms: float
    gflops: float
    effective_gflops: float
    torch_ms: float
    vs_torch: float
    error: float


class Case:
    """A convolution step at a keep ratio, ready to run on the engine (`run`) and whole in PyTorch (`run_torch`)."""

    def __init__(self, shape: Shape, keep: float, isa: str, threads: int) -> None:
        generator = np.random.default_rng(0)
        self.x = torch.from_numpy(generator.standard_normal((1, shape.in_channels, shape.height, shape.width), np.float32))
        self.weight = torch.from_numpy(
            generator.standard_normal((shape.out_channels, shape.in_channels // shape.groups, shape.kernel, shape.kernel), np.float32)
        )
        self.bias = torch.from_numpy(generator.standard_normal(shape.out_channels, np.float32))
        self.shape = shape
        out = self.run_torch()
        positions_in, positions_out = shape.height * shape.width, out.shape[2] * out.shape[3]
        self.active_out = pick(generator, shape.out_channels, keep)
        self.active_in = self.active_out if shape.depthwise else pick(generator, shape.in_channels, 1.0 if shape.in_channels <= 3 else keep)
        compact = self.x[:, self.active_in].reshape(1, -1)
        self.buffers = [
            np.zeros((1, shape.in_channels * positions_in), np.float32),
            np.zeros((1, shape.out_channels * positions_out), np.float32),
        ]
        self.buffers[0][:, : compact.shape[1]] = compact
        step = {
            "op": "depthwise" if shape.depthwise else "conv",
            "name": str(shape),
            "inputs": [(0, 0, shape.in_channels, positions_in, positions_in)],
            "output": (1, 0, shape.out_channels, positions_out, positions_out),
            "ints": {
                "in_size": [shape.in_channels, shape.height, shape.width],
                "out_size": list(out.shape[1:]),
                "kernel": [shape.kernel] * 2,
                "stride": [shape.stride] * 2,
                "padding": [shape.padding] * 4,
                "dilation": [1, 1],
            }
            | ({} if shape.depthwise else {"groups": [shape.groups]}),
            "floats": {},
            "constants": {"weight": self.weight.reshape(shape.out_channels, -1).numpy(), "bias": self.bias.numpy()},
            "in_site": 0,
            "out_site": 0 if shape.depthwise else 1,
        }
        sites = [shape.in_channels] if shape.depthwise else [shape.in_channels, shape.out_channels]
        lists = [[self.active_in.tolist()], [self.active_out.tolist()]][: len(sites)]
        self.runner = _C.StepRunner(isa, step, self.buffers, sites, lists, threads)
        self.flops = 2 * out.numel() * self.weight[0].numel()

    def run(self) -> None:
        """Runs the step once."""
        self.runner.run(1)

    def run_torch(self) -> torch.Tensor:
        """Returns PyTorch's whole convolution."""
        return F.conv2d(self.x, self.weight, self.bias, self.shape.stride, self.shape.padding, 1, self.shape.groups)

    def error(self) -> float:
        """Returns the largest difference between the engine's rows and PyTorch's with the inactive inputs at 0, relative to the largest."""
        masked = torch.zeros_like(self.x)
        masked[:, self.active_in] = self.x[:, self.active_in]
        whole = F.conv2d(masked, self.weight, self.bias, self.shape.stride, self.shape.padding, 1, self.shape.groups)
        expected = whole[:, self.active_out].reshape(1, -1)
        return relative_error(torch.from_numpy(self.buffers[1][:, : expected.shape[1]]), expected)

    @property
    def share(self) -> float:
        """Share of the multiply-adds that run."""
        share_out = len(self.active_out) / self.shape.out_channels
        return share_out if self.shape.depthwise else share_out * len(self.active_in) / self.shape.in_channels


def pick(generator: np.random.Generator, channels: int, keep: float) -> np.ndarray:
    """Returns a random ascending list of at least one channel."""
    return np.sort(generator.permutation(channels)[: max(1, round(keep * channels))])


def read_shapes(path: Path) -> list[Shape]:
    """Returns the rows of a shapes file."""
    with path.open(newline="") as file:
        return [Shape(**{field.name: int(row[field.name]) for field in fields(Shape)}) for row in csv.DictReader(file)]


def measure_case(case: Case, keep: float, seconds: float) -> Row:
    """Returns the times of a case, engine and PyTorch in turns."""
    times = measure_interleaved({"engine": case.run, "torch": case.run_torch}, seconds=seconds, block_seconds=0.05, pause_seconds=0.01)
    ours, torch_ms = times["engine"], times["torch"].median_ms
    effective = case.flops / ours.median_ms * 1e-6
    return Row(
        str(case.shape),
        keep,
        ours.median_ms,
        ours.iqr_ms,
        effective * case.share,
        effective,
        torch_ms,
        torch_ms / ours.median_ms,
        case.error(),
    )


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=Path, default=here / "shapes" / "resnet50.csv", help="default resnet50.csv")
    parser.add_argument("--isa", default=choose_isa(), help="default: the fastest here")
    parser.add_argument("--keep", type=parse_keeps, default=(1.0, 0.5, 0.25), help="default 1,0.5,0.25")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="default: torch's number here")
    parser.add_argument("--seconds", type=positive_float, default=0.3, help="timed seconds per line for each of the two; default 0.3")
    parser.add_argument("--json", type=Path, help="also write the rows there, one JSON object per line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{describe_machine(arguments.threads)}\n{arguments.shapes.name}, kernels {arguments.isa}")
    rows = []
    with torch.inference_mode():
        for shape in read_shapes(arguments.shapes):
            for keep in arguments.keep:
                rows.append(measure_case(Case(shape, keep, arguments.isa, arguments.threads), keep, arguments.seconds))
    table = [
        [
            row.shape,
            row.keep,
            f"{row.median_ms:.4f}",
            f"{row.iqr_ms:.4f}",
            row.gflops,
            row.effective_gflops,
            f"{row.torch_ms:.4f}",
            row.vs_torch,
        ]
        for row in rows
    ]
    print(format_table(["shape", "keep", "median ms", "IQR ms", "GFLOP/s", "effective", "torch ms", "vs torch"], table))
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    wrong = [f"{row.shape} keep {row.keep:g}" for row in rows if row.error > TOLERANCE]
    if wrong:
        raise SystemExit(f"outputs differ from PyTorch's: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
