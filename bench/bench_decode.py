"""Times the gated MLP of a decoder for one token against PyTorch: dense, with a share of its neurons, and by thresholds on its inputs.

    python bench/bench_decode.py --sizes 4096x11008,2048x5632 --keep 0.75,0.5,0.25

A SwiGLU MLP as Llama's, f32, random weights. "keep" runs random single neurons; "inputs" leaves out the smallest inputs of each layer, as a
calibrated decoder does for single tokens, thresholds included. Reading the weights is what takes the time. Outputs are checked.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynprune import DynamicModel
from dynprune.cli.bench import relative_error
from dynprune.cli.machine import describe_machine
from dynprune.cli.models import positive_int
from dynprune.cli.table import format_table
from dynprune.runtime.engine import Engine
from dynprune.runtime.thinning import thinned
from dynprune.timing import measure_interleaved


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(hidden, inner, False), nn.Linear(hidden, inner, False), nn.Linear(inner, hidden, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def thin_engine(model: SwiGLU, x: Tensor, keeps: list[float], threads: int) -> Engine:
    """Returns an engine that keeps share i of the inputs of each layer at level (i + 1) / len(keeps)."""
    plan = DynamicModel(model, x, include=()).plan
    inner = F.silu(model.gate(x)) * model.up(x)
    shares = 1 - torch.tensor(keeps)
    curves = {
        name: torch.cat([torch.tensor([-1.0]), value.abs().flatten().quantile(shares)])
        for name, value in (("gate", x), ("up", x), ("down", inner))
    }
    return Engine(*thinned(plan, curves), num_threads=threads)


def rows_of(hidden: int, inner: int, keeps: list[float], threads: int, seconds: float) -> list[list[str]]:
    """Returns the table's rows of one size."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    model, x = SwiGLU(hidden, inner).eval(), torch.randn(1, 1, hidden)
    dm = DynamicModel(model, x)
    dm.set_num_threads(threads)
    engine, (site,) = dm.engine_for(x), dm.sites
    lists = {keep: {site.name: [np.sort(generator.permutation(inner)[: round(keep * inner)])]} for keep in keeps}
    error = relative_error(dm(x), model(x))
    thin = thin_engine(model, x, keeps, threads)
    functions = {"PyTorch": lambda: model(x), "dense": lambda: engine.run([x])}
    functions |= {f"keep {keep:g}": lambda keep=keep: engine.run([x], active=lists[keep]) for keep in keeps}
    functions |= {f"inputs {keep:g}": lambda i=i: thin.run([x], level=(i + 1) / len(keeps)) for i, keep in enumerate(keeps)}
    times = measure_interleaved(functions, seconds=seconds)
    dense = times["dense"].median_ms
    size = f"{hidden}x{inner}"
    return [[size, name, f"{time.median_ms:.2f}", f"{dense / time.median_ms:.2f}", f"{error:.1e}"] for name, time in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4096x11008,2048x5632", help="hidden x inner features, with commas")
    parser.add_argument("--keep", default="0.75,0.5,0.25", help="shares of the neurons, with commas")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="timed seconds per row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(describe_machine(args.threads))
    keeps = [float(keep) for keep in args.keep.split(",")]
    rows = []
    with torch.no_grad():
        for size in args.sizes.split(","):
            hidden, inner = map(int, size.split("x"))
            rows += rows_of(hidden, inner, keeps, args.threads, args.seconds)
    print(format_table(["size", "what", "median ms", "dense / this", "max error of dense"], rows))


if __name__ == "__main__":
    main()
