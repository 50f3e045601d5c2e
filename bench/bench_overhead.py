"""Times what a call costs beside the engine's steps: Python, PyTorch, controller; on a small network, where it weighs most.

    python bench/bench_overhead.py --threads 1

The network is a ResNet-20 (16, 32, 64 channels, 32x32 pixels, 41 million multiply-adds) with random weights. Each call is timed from
outside and by the engine itself (`dm.last_call.engine_ms`), and the differences count, so that the engine's own noise does not; the
engine leaves the caches as any call finds them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time

import torch

from dynprune.cli.bench import positive_float
from dynprune.cli.demo_digits import ResidualNet
from dynprune.cli.machine import describe_machine
from dynprune.cli.models import positive_int
from dynprune.cli.table import format_table
from dynprune.control.frontier import Frontier, OperatingPoint
from dynprune.control.monitor import ResourceMonitor
from dynprune.runtime.model import DynamicModel
from dynprune.timing import Measurement, measure

BLOCK = 100
"""Calls of one model before it is the next one's turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=positive_int, default=1, help="default 1")
    parser.add_argument("--seconds", type=positive_float, default=2.0, help="timed seconds per line; default 2")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, x = ResidualNet(width=16, blocks=3).eval(), torch.randn(1, 1, 32, 32)
    _, gated, budgeted, watched = models = [DynamicModel(model, x).eval() for _ in range(4)]
    gated.level = 1e-6  # above 0 every gate is evaluated; so near to it nearly all of them keep everything
    always_dense = Frontier((OperatingPoint(0.0, 1.0, 1.0, 0.0, 1.0), OperatingPoint(1.0, 0.5, 0.5, 0.5, 1.0)))
    for dm in (budgeted, watched):
        dm.set_frontier(always_dense, None)
        dm.set_latency_budget(ms=60_000)
    names = (
        "at level 0, no gate evaluated",
        "just above level 0, all gates evaluated",
        "with a latency budget",
        "with a budget and a monitor",
    )
    with torch.no_grad(), ResourceMonitor() as monitor:
        watched.attach_monitor(monitor)
        times = timed_calls(dict(zip(names, models, strict=True)), x, arguments.seconds)
        pytorch = measure(lambda: model(x), min_seconds=arguments.seconds)
    print(describe_machine(arguments.threads))
    rows = []
    for name, (whole, beside) in times.items():
        rows.append([name, f"{whole.median_ms:.4f}", f"{1e3 * beside.median_ms:.1f}", f"{1e3 * beside.iqr_ms:.1f}"])
    print(format_table(["call", "median ms", "beside the engine's steps, us", "IQR us"], rows))
    print(f"PyTorch takes {pytorch.median_ms:.4f} ms")


def timed_calls(models: dict[str, DynamicModel], x: torch.Tensor, seconds: float) -> dict[str, tuple[Measurement, Measurement]]:
    """Returns, by name, how long calls take and how much of that was not in the engine, in blocks of calls by turns."""
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    ends = time.perf_counter() + seconds * len(models)
    gc.disable()
    for name in itertools.cycle(models):
        dm, (whole, beside) = models[name], taken[name]
        dm(x)
        for _ in range(BLOCK):
            began_ns = time.perf_counter_ns()
            dm(x)
            whole.append((time.perf_counter_ns() - began_ns) * 1e-6)
            beside.append(whole[-1] - dm.last_call.engine_ms)
        if time.perf_counter() > ends and len(taken[next(reversed(models))][0]) > 0:
            break
    gc.enable()
    return {name: (Measurement.of(whole), Measurement.of(beside)) for name, (whole, beside) in taken.items()}


if __name__ == "__main__":
    main()
