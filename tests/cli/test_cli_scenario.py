"""`dynprune bench --scenario` on a small model; the figures of a trace; the scripted loads."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dynprune.cli import main, memory_scenario, scenario
from dynprune.cli.neighbours import BusyNeighbours, held_memory
from dynprune.cli.own_cgroup import NoCgroupError, OwnCgroup
from dynprune.cli.scenarios import NAMES, make_scenario
from dynprune.cli.trace import Trace, figures_of
from dynprune.control.frontier import Frontier, OperatingPoint
from dynprune.runtime.model import DynamicModel
from dynprune.training.calibrate import calibrate

SOURCE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 1), Block(), Block()), torch.randn(1, 3, 12, 12)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(scenario, "_BASE_S", 0.05)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the model's source and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("scenario")
    (folder / "net.py").write_text(SOURCE)
    namespace: dict = {}
    exec(SOURCE, namespace)
    model, x = namespace["make"]()
    with torch.no_grad():
        dm = DynamicModel(model.eval(), x)
        calibrate(dm, [torch.randn(8, 3, 12, 12) for _ in range(4)], levels=4)
    dm.save(folder / "dm.safetensors")
    return folder


def words(folder: Path, name: str, *more: str) -> list[str]:
    options = ["--checkpoint", str(folder / "dm.safetensors"), "--against", "none", "--threads", "1"]
    return ["bench", f"{folder / 'net.py'}:make", "--scenario", name, *options, *more]


@pytest.mark.parametrize("name", ["idle", "beside", "step", "ramp", "burst"])
def test_scenario_prints_plots_and_writes(folder, capsys, name):
    out, plot = folder / f"{name}.json", folder / f"{name}.png"
    assert main(words(folder, name, "--duration", "0.4", "--json", str(out), "--plot", str(plot))) == 0
    printed = capsys.readouterr().out
    assert "dense (level 0)" in printed and "fixed level" in printed and f"scenario {name}" in printed
    report = json.loads(out.read_text())
    assert [variant["name"].split()[0] for variant in report["variants"]] == ["budget", "dense", "fixed"]
    assert all(len(variant["trace"]["latency_ms"]) == variant["figures"]["inferences"] > 0 for variant in report["variants"])
    assert plot.stat().st_size > 1000


def test_rivals_are_served_too(folder, capsys):
    assert main([*words(folder, "idle", "--duration", "0.1"), "--against", "eager"]) == 0
    assert "\neager " in capsys.readouterr().out


def test_without_a_checkpoint_the_model_is_calibrated(folder, capsys):
    command = ["bench", f"{folder / 'net.py'}:make", "--scenario", "idle", "--duration", "0.1", "--budget-ms", "50", "--against", "none"]
    assert main(command) == 0
    assert "within 50.00 ms" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["quota", "memory"])
def test_scenarios_that_need_a_control_group_run_or_say_why_not(folder, capsys, name):
    code = main(words(folder, name, "--duration", "0.3"))
    printed = capsys.readouterr()
    if name == "memory":
        assert code == 0 and "engine, dense" in printed.out
    else:
        assert code == 0 or "cannot run here" in printed.err


def test_memory_without_a_control_group_is_set_by_hand(folder, capsys, monkeypatch):
    def refuse(controller):
        raise NoCgroupError("not here")

    monkeypatch.setattr(memory_scenario, "OwnCgroup", refuse)
    assert main(words(folder, "memory")) == 0
    assert "No control group here (not here)" in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--scenario", "storm"), ("--budget-ms", "0"), ("--duration", "-1"), ("--gap-ms", "x")])
def test_wrong_options_are_refused(folder, option):
    with pytest.raises(SystemExit) as exit_:
        main([*words(folder, "idle"), *option])
    assert exit_.value.code == 2


def test_missing_folders_and_percentiles_are_told(folder, capsys):
    assert main(words(folder, "idle", "--plot", "/nowhere/plot.png")) == 2
    assert "/nowhere" in capsys.readouterr().err
    assert main(words(folder, "idle", "--duration", "0.1", "--percentile", "100")) == 2
    assert "percentile" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in NAMES if name != "memory"])
@pytest.mark.parametrize("cores", [1, 2, 8])
def test_loads_come_and_go(name, cores):
    made = make_scenario(name, 10.0, cores)
    times = [seconds for seconds, _ in made.changes]
    assert times == sorted(times) and all(0 <= seconds < 10 for seconds in times)
    assert made.most == {"idle": 0, "beside": cores, "step": cores, "ramp": 2 * cores, "burst": cores, "quota": cores / 2}[name]
    if name in ("step", "ramp", "quota"):
        assert made.changes[-1][1] == 0


def frontier() -> Frontier:
    return Frontier((OperatingPoint(0, 10, 10, 0, 1.0), OperatingPoint(1, 5, 5, 0.5, 0.9)))


def test_figures_of_a_trace():
    trace = Trace()
    for i in range(400):
        load = 1.0 if 100 <= i < 300 else 0.0
        level = 1.0 if load and i > 101 else 0.0
        latency = (10 - 5 * level) * (2.0 if load else 1.0)
        trace.add(0.02 * i, latency, level, level, 2, load)
    figures = figures_of(trace, 12.0, 95, frontier())
    assert figures.inferences == 400
    assert figures.first_second_misses == pytest.approx(2 / 50) and figures.steady_misses == 0
    assert figures.recovery == 3, "two missed, the third kept the budget"
    assert figures.slack == pytest.approx(1 - 10 / 12) and figures.hindsight_slack == pytest.approx(0)
    assert figures.level_changes == pytest.approx(2 / 399)
    assert figures.mean_level == pytest.approx(198 / 400) and figures.guarded == 0
    best = 0.9 + 0.1 * (6 - 5) / 5
    assert figures.accuracy_loss == pytest.approx((198 * (best - 0.9) + 2 * (best - 1.0)) / 400)


def test_the_slack_in_hindsight_is_that_of_the_spread():
    trace = Trace()
    for i in range(100):
        trace.add(0.02 * i, 12.0 if i % 10 == 0 else 6.0, 1.0, 1.0, 2, 0.0)
    figures = figures_of(trace, 12.0, 95, frontier())
    assert figures.slack == figures.hindsight_slack == pytest.approx(0.9 * 0.5), "nobody keeps 95 of 100 within 12 ms with less"
    best = figures_of(trace, 9.0, 85, frontier())
    assert best.hindsight_slack == pytest.approx(0) and math.isnan(figures_of(trace, 24.0, 85, frontier()).hindsight_slack)


def test_figures_of_nothing_to_count():
    trace = Trace()
    trace.add(0.0, 5.0, 0.0, 0.0, 1, 0.0)
    figures = figures_of(trace, 12.0, 95, frontier())
    assert figures.recovery == 1 and figures.steady_misses == 0
    assert math.isnan(figures.first_second_misses) and math.isnan(figures.slack)


def test_neighbours_run_when_they_are_told_to():
    def busy_s(process) -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with BusyNeighbours(1) as neighbours:
        (process,) = neighbours._processes
        rest = busy_s(process)
        time.sleep(0.1)
        assert busy_s(process) - rest <= 0.02
        neighbours.set(1)
        time.sleep(0.5)
        assert busy_s(process) > rest
    assert process.poll() is not None


def test_neighbours_die_with_the_process_that_started_them():
    code = (
        "import os, signal; from dynprune.cli.neighbours import BusyNeighbours; n = BusyNeighbours(1); n.set(1);"
        "print(n._processes[0].pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "left running"
        time.sleep(0.02)


def test_held_memory_is_given_back():
    with held_memory(1 << 20):
        pass


def test_a_control_group_that_cannot_be_made_is_told(monkeypatch):
    monkeypatch.setattr("dynprune.cli.own_cgroup.cgroup_directories", lambda root, controller: (0, []))
    with pytest.raises(NoCgroupError, match="mounted"):
        OwnCgroup("cpu")
    monkeypatch.setattr("dynprune.cli.own_cgroup.cgroup_directories", lambda root, controller: (2, ["/proc/self"]))
    with pytest.raises(NoCgroupError, match="/proc/self"), OwnCgroup("cpu"):
        pass
