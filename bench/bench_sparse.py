"""Finds from which share of zeros a sparse weight runs faster than the dense one, per kind of layer; outputs checked.

    python bench/bench_sparse.py --threads 1

One line per shape and pattern: the dense step's time (Winograd where the engine would take it), and for each sparsity the dense time
over the sparse step's: above 1 sparse is faster. "1x1" zeros stand anywhere, "4x1" zeros are shared by four output channels each.
"""

from __future__ import annotations

import argparse

import numpy as np

from dynprune.cli.bench import relative_error
from dynprune.cli.machine import describe_machine
from dynprune.cli.models import positive_int
from dynprune.cli.table import format_table
from dynprune.runtime import _C
from dynprune.runtime.engine import choose_isa

SPARSITIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
# name, in_channels, out_channels, side of the plane, kernel, stride; a side of 0 is a linear layer of one position
SHAPES = (
    ("1x1 256-256 28x28", 256, 256, 28, 1, 1),
    ("1x1 512-512 14x14", 512, 512, 14, 1, 1),
    ("1x1 1024-256 7x7", 1024, 256, 7, 1, 1),
    ("3x3 128-128 28x28", 128, 128, 28, 3, 1),
    ("3x3 256-256 14x14", 256, 256, 14, 3, 1),
    ("3x3/2 256-256 14x14", 256, 256, 28, 3, 2),
    ("linear 1280-1000", 1280, 1000, 0, 1, 1),
    ("linear 256-256", 256, 256, 0, 1, 1),
)


class Case:
    """One layer with a given share of zeros; `runner(sparse)` gives the step that skips them or does not."""

    def __init__(self, shape: tuple, sparsity: float, block: int, isa: str, threads: int) -> None:
        self.name, channels, outputs, side, kernel, stride = shape
        generator = np.random.default_rng(0)
        self.isa, self.threads = isa, threads
        columns = channels * kernel * kernel
        keep = generator.random((outputs // block, columns)).repeat(block, 0) >= sparsity
        weight = (generator.standard_normal((outputs, columns)) * keep).astype(np.float32)
        constants = {"weight": weight, "bias": generator.standard_normal(outputs).astype(np.float32)}
        self.step = {"name": self.name, "constants": constants, "floats": {}}
        if side == 0:
            positions_in = positions_out = 1
            self.step |= {"op": "linear", "ints": {"in_features": [channels], "out_features": [outputs]}}
        else:
            out_side = side // stride
            positions_in, positions_out, pad = side * side, out_side * out_side, kernel // 2
            ints = {"in_size": [channels, side, side], "out_size": [outputs, out_side, out_side], "kernel": [kernel] * 2}
            self.step |= {"op": "conv", "ints": ints | {"stride": [stride] * 2, "padding": [pad] * 4, "dilation": [1, 1], "groups": [1]}}
        self.step["inputs"] = [(0, 0, channels, positions_in, positions_in)]
        self.step["output"] = (1, 0, outputs, positions_out, positions_out)
        slack = 256  # room behind the planes, as a plan's arena has: 1x1 convolutions read whole tiles there
        self.x = generator.standard_normal((1, channels * positions_in + slack)).astype(np.float32)
        self.size = outputs * positions_out

    def runner(self, sparse: bool) -> tuple[_C.StepRunner, np.ndarray]:
        """Returns the step ready to run, and where its output lies."""
        y = np.zeros((1, self.size), np.float32)
        step = self.step | {"ints": self.step["ints"] | {"sparse": [int(sparse)]}}
        return _C.StepRunner(self.isa, step, [self.x, y], [], [], self.threads), y

    def measure(self, runs: int) -> tuple[float, float]:
        """Returns median microseconds of the dense and of the sparse step, run in turns."""
        dense, want = self.runner(False)
        sparse, got = self.runner(True)
        times = ([], [])
        for _ in range(runs):
            times[0].extend(dense.run(4)[1:])
            times[1].extend(sparse.run(4)[1:])
        if relative_error(got, want) > 1e-4:
            raise SystemExit(f"{self.name}: the sparse step's output differs from the dense one's")
        return float(np.median(times[0])) / 1e3, float(np.median(times[1])) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default=choose_isa(), help="default: the fastest here")
    parser.add_argument("--threads", type=positive_int, default=1, help="default 1")
    parser.add_argument("--runs", type=positive_int, default=30, help="rounds of three timed runs each; default 30")
    arguments = parser.parse_args()
    print(f"{describe_machine(arguments.threads)}\nkernels {arguments.isa}")
    table = []
    for shape in SHAPES:
        for block in (1, 4):
            rows = [Case(shape, s, block, arguments.isa, arguments.threads).measure(arguments.runs) for s in SPARSITIES]
            dense_us = float(np.median([dense for dense, _ in rows]))
            table.append([shape[0], f"{block}x1", f"{dense_us:.1f}", *(f"{dense / sparse:.2f}" for dense, sparse in rows)])
    print(format_table(["layer", "zeros", "dense us", *(f"{s:.0%}" for s in SPARSITIES)], table))


if __name__ == "__main__":
    main()
