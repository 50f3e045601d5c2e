"""Times what a call costs beside its steps: Python, gates, index lists, controller; on a small network, where it weighs most.

    python bench/bench_overhead.py --threads 1

The network is a ResNet-20 (16, 32, 64 channels, 32x32 pixels, 41 million multiply-adds) with random weights.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from dynprune.cli.bench import positive_float, random_active
from dynprune.cli.demo_digits import ResidualNet
from dynprune.cli.machine import describe_machine
from dynprune.cli.models import positive_int
from dynprune.cli.table import format_table
from dynprune.control.frontier import Frontier, OperatingPoint
from dynprune.control.monitor import ResourceMonitor
from dynprune.runtime.model import DynamicModel
from dynprune.timing import measure_interleaved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=positive_int, default=1, help="default 1")
    parser.add_argument("--seconds", type=positive_float, default=2.0, help="timed seconds per line; default 2")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, x = ResidualNet(width=16, blocks=3).eval(), torch.randn(1, 1, 32, 32)
    dense, gated, budgeted, watched = (DynamicModel(model, x).eval() for _ in range(4))
    gated.level = 1e-6  # above 0 every gate is evaluated; so near to it nearly all of them keep everything
    always_dense = Frontier((OperatingPoint(0.0, 1.0, 1.0, 0.0, 1.0), OperatingPoint(1.0, 0.5, 0.5, 0.5, 1.0)))
    for dm in (budgeted, watched):
        dm.set_frontier(always_dense, None)
        dm.set_latency_budget(ms=60_000)
    whole = random_active(dense.sites, 1.0, batch=1)
    engine = dense.engine_for(x)
    with torch.inference_mode(), ResourceMonitor() as monitor:
        watched.attach_monitor(monitor)
        times = measure_interleaved(
            {
                "call at level 0, no gate evaluated": lambda: dense(x),
                "call just above level 0, all gates evaluated": lambda: gated(x),
                "with a latency budget": lambda: budgeted(x),
                "with a budget and a monitor": lambda: watched(x),
                "engine alone, without the wrapper": lambda: engine.run([x]),
                "given lists of all channels": lambda: dense.run_with_active(x, active=whole),
                "the model in PyTorch": lambda: model(x),
            },
            seconds=arguments.seconds,
        )
        steps_ms = statistics.median(sum(engine.step_times_ms([x])) for _ in range(50))
    print(describe_machine(arguments.threads))
    rows = [[name, f"{taken.median_ms:.4f}", f"{taken.iqr_ms:.4f}", f"{taken.median_ms - steps_ms:+.4f}"] for name, taken in times.items()]
    print(format_table(["", "median ms", "IQR ms", "beside the steps, ms"], rows))
    print(f"the steps alone take {steps_ms:.4f} ms")


if __name__ == "__main__":
    main()
