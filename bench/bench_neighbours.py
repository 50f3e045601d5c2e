"""Times a model at level 0 beside busy processes: what a neighbour costs the engine and what it costs its rivals.

    python bench/bench_neighbours.py torchvision:resnet50 --against onnxruntime,openvino --neighbours 0,1,2

Every neighbour is a process of one thread that never sleeps. The fair share is the engine's own idle median times (threads +
neighbours) / cores, where that is above 1: what it would take if every runnable thread got the same time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time

import torch

from dynprune.cli.machine import describe_machine
from dynprune.cli.models import add_model_arguments, load_model, positive_int
from dynprune.cli.rivals import built_rivals, parse_names
from dynprune.cli.table import format_table
from dynprune.runtime.model import DynamicModel
from dynprune.timing import percentiles


def never_sleep() -> None:
    while True:
        pass


def latencies_ms(run, seconds: float) -> list[float]:
    """Returns the times of calls made one after the other, 5 ms apart."""
    run()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
        time.sleep(0.005)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--against", type=parse_names, default=("onnxruntime",), help="rivals, comma-separated; default onnxruntime")
    parser.add_argument("--neighbours", default="0,1,2", help="busy processes, comma-separated; default 0,1,2")
    parser.add_argument("--threads", type=positive_int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="timed seconds per line; default 10")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments)
    model, inputs = loaded.model, loaded.inputs
    dm = DynamicModel(model, inputs).eval()
    cores = len(os.sched_getaffinity(0))
    rows = []
    with torch.inference_mode(), built_rivals(arguments.against, model, inputs, arguments.threads) as rivals:
        runs = {"dynprune": lambda: dm(*inputs), **{rival.name: rival.run for rival in rivals if rival.run is not None}}
        idle_ms: dict[str, float] = {}
        for neighbours in map(int, arguments.neighbours.split(",")):
            processes = [multiprocessing.Process(target=never_sleep, daemon=True) for _ in range(neighbours)]
            for process in processes:
                process.start()
            try:
                for name, run in runs.items():
                    p50, p95, p99 = percentiles(latencies_ms(run, arguments.seconds))
                    idle_ms.setdefault(name, p50)
                    fair = idle_ms["dynprune"] * max(1.0, (arguments.threads + neighbours) / cores)
                    rows.append([name, str(neighbours), f"{p50:.1f}", f"{p95:.1f}", f"{p99:.1f}", f"{fair:.1f}"])
                    time.sleep(0.3)
            finally:
                for process in processes:
                    process.terminate()
                    process.join()
    print(describe_machine(arguments.threads))
    print(format_table(["", "neighbours", "p50 ms", "p95 ms", "p99 ms", "fair share ms"], rows))


if __name__ == "__main__":
    main()
