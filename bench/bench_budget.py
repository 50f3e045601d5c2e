"""Serves ResNet-50 and the CIFAR ResNet-56 under scripted loads and a latency budget, and measures what keeping it costs.

    python bench/bench_budget.py --models resnet56,resnet50 --scenarios idle,step,burst --seconds 8 --folder budget-results
    python bench/bench_budget.py --models resnet56,resnet50 --scenarios none --costs

ResNet-56 has real weights and images where the data folder is ($DYNPRUNE_DATA, or ../shared/data beside the checkout), else random ones;
the first run calibrates it, in a minute, and keeps the result in the folder. ResNet-50 has random weights (needs torchvision) and gates
that keep the same share of every channel site, down to a quarter at level 1; accuracy means nothing there. Every run measures the times of
the levels again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from dynprune.cli.machine import describe_machine
from dynprune.cli.memory_scenario import memory_text, rss_bytes, run_memory
from dynprune.cli.models import declare_torchvision_operators, positive_float, positive_int
from dynprune.cli.own_cgroup import NoCgroupError
from dynprune.cli.rivals import built_rivals, parse_names
from dynprune.cli.scenario import run_scenario, scenario_text
from dynprune.cli.scenarios import NAMES, Call, make_scenario, serve
from dynprune.cli.table import format_table
from dynprune.control.frontier import Frontier, OperatingPoint
from dynprune.control.monitor import ResourceMonitor
from dynprune.control.slowdown import SlowdownEstimator
from dynprune.control.sources import allowed_cores
from dynprune.runtime.engine import Engine
from dynprune.runtime.model import DynamicModel
from dynprune.runtime.profile import fit_to_latencies, level_latencies, machine_name, measure_costs
from dynprune.training.calibrate import calibrate

DATA = Path(os.environ.get("DYNPRUNE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
CALIBRATION = {"resnet56": 512}
SERVED = {"resnet56": 256, "resnet50": 16}
RECORDED = (("idle", 0), ("step", 1), ("step", 2), ("burst", 2))
"""Scenario and busy processes of the slow-downs that `--record` writes."""


def real_data():
    """Returns the data folder's loader, or None where it is absent."""
    if not (DATA / "load.py").exists():
        return None
    spec = importlib.util.spec_from_file_location("dynprune_real_data", DATA / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resnet56() -> tuple[torch.nn.Module, list, torch.Tensor]:
    """Returns network, calibration batches and images to serve."""
    data = real_data()
    if data is None:
        from dynprune.cli.demo_digits import ResidualNet

        print("no data folder: a residual network of the same size with random weights")
        images = torch.randn(CALIBRATION["resnet56"] + SERVED["resnet56"], 1, 32, 32)
        served, rest = images.split([SERVED["resnet56"], CALIBRATION["resnet56"]])
        return ResidualNet(width=16, blocks=9).eval(), list(rest.split(64)), served
    images, labels = data.cifar10("train")
    chosen = np.random.default_rng(0).choice(len(images), CALIBRATION["resnet56"], replace=False)
    batches = list(zip(data.cifar_input(images[chosen]).split(64), torch.from_numpy(labels[chosen]).split(64), strict=True))
    return data.network("cifar_resnet56"), batches, data.cifar_input(data.cifar10("test")[0][: SERVED["resnet56"]])


def resnet50() -> tuple[torch.nn.Module, torch.Tensor]:
    """Returns the network and images to serve."""
    declare_torchvision_operators()
    from torchvision.models import resnet50 as build

    torch.manual_seed(0)
    return build(weights=None).eval(), torch.randn(SERVED["resnet50"], 3, 224, 224)


def calibrated(name: str, folder: Path) -> tuple[DynamicModel, list[tuple[torch.Tensor]], int]:
    """Returns the model with its gates, the calls to serve, and the resident memory before it was captured."""
    if name == "resnet50":
        model, images = resnet50()
        base_bytes, inputs = rss_bytes(), [(image[None],) for image in images]
        dm = DynamicModel(model, inputs[0]).eval()
        keep_evenly(dm, inputs)
        return dm, inputs, base_bytes
    model, batches, images = resnet56()
    base_bytes, inputs = rss_bytes(), [(image[None],) for image in images]
    path = folder / f"{name}.safetensors"
    if path.exists():
        dm = DynamicModel.load(path, model, remeasure=False).eval()
        dm.remeasure(*inputs[0])
    else:
        labelled = isinstance(batches[0], tuple)
        dm = DynamicModel(model, inputs[0]).eval()
        metric = (lambda output, labels: (output.argmax(1) == labels).double().mean().item()) if labelled else None
        calibrate(dm, batches, metric=metric, progress=True)
        dm.save(path)
    return dm, inputs, base_bytes


def keep_evenly(dm: DynamicModel, inputs: list, levels: int = 9, least: float = 0.25) -> None:
    """Makes every channel gate keep an even share, from all at level 0 to `least` at level 1, and measures the frontier.

    For a network with random weights, whose accuracy means nothing; the gates cost what calibrated ones do.
    """
    keeps = torch.linspace(1, least, levels)
    for site in dm.sites:
        gate = dm.gate(site.name)
        scores = torch.linspace(0, 1, site.num_groups)[torch.randperm(site.num_groups)]
        gate.bias.data.copy_(scores)
        gate.down.data.normal_(std=1e-7)  # not zero: the engine leaves such factors out
        gate.set_curve(torch.quantile(scores, 1 - keeps) - 1e-3 if site.kind == "channels" else torch.full((levels,), -10.0))
        gate.calibrated.fill_(True)
    dm.refresh()
    engine = dm.engine_for(*inputs[0])
    runs = [lambda threads, level=i / (levels - 1): engine.run(inputs[0], level=level, num_threads=threads) for i in range(levels)]
    latencies_ms, fewer_threads = level_latencies(runs, dm.num_threads, 0.2)
    channels = {site.name for site in dm.sites if site.kind == "channels"}
    shares = [{name: keep[None] for name in channels} for keep in keeps]
    table = measure_costs(engine, inputs[0], {site.name: site for site in dm.sites})
    costs, skip_rates = fit_to_latencies(dm.plan, table, shares, latencies_ms)
    rows = zip(costs.level_ms.sum(1).tolist(), latencies_ms, skip_rates, strict=True)
    points = tuple(OperatingPoint(i / (levels - 1), predicted, ms, max(0.0, skip), 1.0) for i, (predicted, ms, skip) in enumerate(rows))
    dm.set_frontier(Frontier(points, machine_name(engine.isa), dm.num_threads, fewer_threads), costs)


def cost_errors(dm: DynamicModel, inputs: list) -> tuple[float, float, float]:
    """Returns medians of |predicted / measured - 1| of whole inferences, over levels and inputs.

    First as they are, the change of the machine's speed since the times were measured included; then as the controller uses them, times
    the slow-down that it has estimated from the inferences before; last what repetitions of the same inference differ by from their own
    median, which no prediction can be better than.
    """
    engine, slowdown = dm.engine_for(*inputs[0]), SlowdownEstimator()
    ratios: dict[tuple[float, int], list[float]] = {}
    tracked = []
    for _ in range(12):
        for level in np.linspace(0, 1, 9):
            for number in range(4):
                began = time.perf_counter()
                _, done = engine.run(inputs[number], level=float(level))
                measured_ms = (time.perf_counter() - began) * 1e3
                if number:  # the first after another level finds other rows in the caches
                    ratios.setdefault((level, number), []).append(done.predicted_ms / measured_ms)
                    tracked.append(math.exp(slowdown.mean) * done.predicted_ms / measured_ms)
                    slowdown.update(math.log(measured_ms / done.predicted_ms))
    everything = np.concatenate([np.array(some) for some in ratios.values()])
    noise = np.concatenate([np.array(some) / np.median(some) for some in ratios.values()])
    return tuple(float(np.median(abs(some - 1))) for some in (everything, np.array(tracked), noise))


def keeping_costs(dm: DynamicModel, inputs: list) -> list[list[object]]:
    """Returns what keeping a budget costs beside the inference itself, a row per part."""
    idle_ms = dm.frontier.latency_ms_at(0.0)
    error, tracked_error, noise = cost_errors(dm, inputs)
    dm.set_latency_budget(ms=1.2 * idle_ms, percentile=99)
    controller = dm._controller
    change_us = _microseconds(lambda: dm.set_latency_budget(ms=1.2 * idle_ms, percentile=99))

    limits = {"work": 1.0, "limit_ms": controller.budget_ms}
    usual_ms = dm.frontier.predicted_ms_at(0.0)

    def turn() -> None:
        level, threads = controller.next_level(None, **limits), controller.threads
        controller.observe(idle_ms * controller.pace, usual_ms, level=level, threads=threads, guarded=False, **limits)

    controller_us = _microseconds(turn)
    dm.set_latency_budget(ms=0.7 * idle_ms)
    gated_controller_us = _microseconds(turn)
    dm.set_latency_budget(None)
    guard_us, gated_guard_us = (_guard_us(dm.engine_for(*inputs[0]), inputs[0], level) for level in (0.0, 0.5))
    monitor = ResourceMonitor(interval_s=60)
    monitor.sample()
    began = time.thread_time()
    for _ in range(200):
        monitor._refresh()
    sample_us = (time.thread_time() - began) / 200 * 1e6
    monitor_share = sample_us * 1e-6 / 0.2
    gated_ms = dm.frontier.latency_ms_at(0.5)
    share = (controller_us + max(0.0, guard_us)) / (idle_ms * 1e3) + monitor_share
    gated_share = (gated_controller_us + max(0.0, gated_guard_us)) / (gated_ms * 1e3) + monitor_share
    return [
        ["cost model, median of |predicted / measured - 1|", f"{error:.1%}"],
        ["the same with the slow-down that the controller has estimated", f"{tracked_error:.1%}"],
        ["repetitions of the same inference", f"{noise:.1%}"],
        ["a budget changed", f"{change_us:.1f} us"],
        ["controller, a call at level 0 / above", f"{controller_us:.1f} / {gated_controller_us:.1f} us"],
        ["deadline guard, a call at level 0 / 0.5 (median of differences)", f"{guard_us:+.1f} / {gated_guard_us:+.1f} us"],
        ["monitor, a sample", f"{sample_us:.0f} us, {monitor_share:.2%} of a core at 200 ms"],
        ["all three, of an inference at level 0 / 0.5", f"{share:.2%} of {idle_ms:.2f} ms / {gated_share:.2%} of {gated_ms:.2f} ms"],
    ]


def _guard_us(engine: Engine, inputs: tuple, level: float, seconds: float = 6.0) -> float:
    """Returns by how many microseconds a deadline far away makes an inference longer: the median over pairs of one with and one without."""
    far_ns = time.monotonic_ns() + 10**15
    differences, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        times = {}
        for deadline_ns in (0, far_ns) if len(differences) % 2 else (far_ns, 0):
            began = time.perf_counter()
            engine.run(inputs, level=level, deadline_ns=deadline_ns)
            times[deadline_ns] = time.perf_counter() - began
        differences.append((times[far_ns] - times[0]) * 1e6)
    return statistics.median(differences)


def _microseconds(function, runs: int = 2000) -> float:
    times = []
    for _ in range(runs):
        began = time.perf_counter_ns()
        function()
        times.append(time.perf_counter_ns() - began)
    return statistics.median(times) / 1e3


def record(dm: DynamicModel, inputs: list, path: Path, seconds: float) -> None:
    """Writes how many times slower than the idle median dense inferences ran beside busy processes: arrays of seconds and ratios."""
    cores = int(allowed_cores())

    def call(number: int) -> Call:
        dm(*inputs[number % len(inputs)])
        return Call(0.0, 0.0, dm.num_threads)

    traces = {}
    for name, hogs in RECORDED:
        scenario = make_scenario(name, seconds, cores, neighbours=hogs)
        traces[f"{name}{hogs}"] = serve(lambda: nullcontext(call), scenario, seconds, 0.001, cores)
    idle_ms = statistics.median(traces["idle0"].latency_ms)
    arrays = {}
    for name, trace in traces.items():
        arrays[f"{name}.start_s"] = np.array(trace.start_s, np.float32)
        arrays[f"{name}.slowdown"] = (np.array(trace.latency_ms) / idle_ms).astype(np.float16)
    np.savez_compressed(path, **arrays)
    print(f"{path}: {', '.join(f'{name} {len(trace)}' for name, trace in traces.items())} inferences, idle median {idle_ms:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet56,resnet50")
    parser.add_argument("--scenarios", default=",".join(NAMES), help=f"of {','.join(NAMES)}, or none; default all")
    parser.add_argument("--budget-ms", type=positive_float, help="default by --budget-factor")
    parser.add_argument("--budget-factor", type=positive_float, default=1.5, help="times the idle median at level 0; default 1.5")
    parser.add_argument("--percentile", type=float, default=95.0)
    parser.add_argument("--seconds", type=positive_float, default=8.0, help="each variant is served; default 8")
    parser.add_argument("--gap-ms", type=float, default=1.0, help="pause between calls; default 1")
    parser.add_argument("--neighbours", type=positive_int, help="busy processes in beside, step and burst; default one per core")
    parser.add_argument("--against", type=parse_names, default=(), help="rivals to serve too, such as onnxruntime,openvino; default none")
    parser.add_argument("--threads", type=positive_int, default=int(allowed_cores()))
    parser.add_argument("--folder", type=Path, default=Path("budget-results"), help="checkpoints, plots and traces; default budget-results")
    parser.add_argument("--costs", action="store_true", help="also measure the cost model's error and what keeping a budget costs")
    parser.add_argument("--record", type=Path, metavar="FILE.npz", help="record slow-downs beside busy processes, for simulations")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(exist_ok=True)
    scenarios = [name for name in arguments.scenarios.split(",") if name != "none"]
    for name in arguments.models.split(","):
        with torch.no_grad():
            dm, inputs, base_bytes = calibrated(name, arguments.folder)
            first, last = (dm.frontier.latency_ms_at(level) for level in (0.0, 1.0))
            print(f"{describe_machine(arguments.threads)}\n{name}: {first:.2f} ms at level 0, {last:.2f} at level 1, back to back\n")
            if arguments.costs:
                print(format_table([name, "measured"], keeping_costs(dm, inputs), text_columns=2), "\n")
            if arguments.record:
                record(dm, inputs, arguments.record, arguments.seconds)
            for scenario in scenarios:
                run(name, scenario, dm, inputs, base_bytes, arguments)


def run(name: str, scenario: str, dm: DynamicModel, inputs: list, base_bytes: int, arguments: argparse.Namespace) -> None:
    """Prints one scenario, and writes its plot and traces."""
    try:
        if scenario == "memory":
            print(memory_text(run_memory(dm, inputs, model_name=name, base_bytes=base_bytes)), "\n")
            return
        with built_rivals(arguments.against, dm.model, inputs[0], arguments.threads) as built:
            rivals = {rival.name: lambda number, rival=rival: rival.run() for rival in built if rival.run is not None}
            report = run_scenario(
                dm,
                scenario,
                inputs,
                budget_ms=arguments.budget_ms,
                budget_factor=arguments.budget_factor,
                percentile=arguments.percentile,
                seconds=arguments.seconds,
                gap_s=arguments.gap_ms / 1e3,
                neighbours=arguments.neighbours,
                rivals=rivals,
                model_name=name,
            )
    except NoCgroupError as error:
        print(f"{name}, scenario {scenario}: cannot run here: {error}\n")
        return
    print(scenario_text(report), "\n")
    (arguments.folder / f"{name}-{scenario}.json").write_text(json.dumps(report.to_dict()))
    try:
        from dynprune.cli.scenario_plot import plot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    plot(report, arguments.folder / f"{name}-{scenario}.png")


if __name__ == "__main__":
    main()
