"""`dynprune prune` prints the report and saves what load_pruned takes."""

from __future__ import annotations

import runpy

import pytest

from dynprune import load_pruned
from dynprune.cli import main

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
    return net, torch.ones(1, 3, 8, 8)
"""


@pytest.fixture
def model(tmp_path) -> str:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return f"{path}:make"


def test_prints_the_report_and_saves(model, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    assert main(["prune", model, "--macs", "0.5", "--round-to", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("before", "parameters:", "multiply-adds:", "latency (engine):", "saved to"))
    make = runpy.run_path(model.removesuffix(":make"))["make"]
    (net, x), (again, _) = make(), make()
    small = load_pruned(out, again)
    assert small[0].out_channels == 8
    assert small(x).shape == net(x).shape


def test_a_target_out_of_reach_is_told_in_one_line(model, capsys):
    assert main(["prune", model, "--macs", "2"]) == 2
    assert "nearest is" in capsys.readouterr().err


def test_one_goal_is_needed(model, capsys):
    with pytest.raises(SystemExit):
        main(["prune", model])
    assert "one of the arguments --keep --macs --ms is required" in capsys.readouterr().err
