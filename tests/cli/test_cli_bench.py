"""`dynprune bench` on a small model: what it measures, prints, writes and checks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from dynprune.cli import bench, main
from dynprune.graph.sites import Site

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
    return nn.Sequential(nn.Conv2d(3, 16, 1), Block(), Block()), torch.randn(1, 3, 12, 12)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """The JSON report of one run, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "net.py").write_text(SOURCE)
    out = folder / "out.json"
    words = ["bench", f"{folder / 'net.py'}:make", "--keep", "1,0.5", "--against", "eager", "--threads", "1", "--seconds", "0.05"]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *values, **_: printed.append(" ".join(map(str, values))))
        assert main([*words, "--batch", "2", "--json", str(out)]) == 0
    return json.loads(out.read_text()) | {"printed": "\n".join(printed)}


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_are_consistent(report):
    whole, half = report["keeps"]
    assert (whole["keep"], half["keep"]) == (1, 0.5)
    assert whole["skip_rate"] == pytest.approx(0, abs=1e-6)
    assert 0.4 < half["skip_rate"] < 0.5  # all but the first convolution is inside the sites
    assert half["flops_ratio"] == pytest.approx(1 / (1 - half["skip_rate"]))
    assert half["speedup"] == pytest.approx(whole["median_ms"] / half["median_ms"])
    assert half["realised_ratio"] == pytest.approx(half["speedup"] / half["flops_ratio"])
    assert half["against"]["eager"] == pytest.approx(report["rivals"][0]["median_ms"] / half["median_ms"])


def test_outputs_were_checked(report):
    assert all(row["error"] < 1e-4 for row in report["keeps"] + report["rivals"])


def test_conditions_are_stated(report):
    assert report["machine"]["threads"] == 1
    assert report["machine"]["torch"] == torch.__version__
    assert report["input_shapes"] == [[2, 3, 12, 12]]
    assert report["machine"]["cpu"] in report["printed"]
    assert "vs eager" in report["printed"]


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 1.0])
def test_random_lists_ascend_and_keep_their_share(keep):
    sites = (site("a", "channels", 40), site("b", "branch", 1), site("c", "channels", 3))
    active = bench.random_active(sites, keep, batch=3)
    assert set(active) == {"a", "c"}
    for name, groups in (("a", 40), ("c", 3)):
        assert len(active[name]) == 3
        for chosen in active[name]:
            assert len(chosen) == max(1, round(keep * groups))
            assert (np.diff(chosen) > 0).all()
            assert chosen.min() >= 0
            assert chosen.max() < groups


def site(name: str, kind: str, channels: int) -> Site:
    return Site(name, kind, channels, 1, (), (), 0, 0.0, "", 1, frozenset())


@pytest.mark.parametrize(
    ("output", "expected"),
    [([1.0, 4.0], 0.0), ([1.0, 4.4], 0.1), ([1.0, float("nan")], math.inf), ([1.0, 4.0, 0.0], math.inf)],
    ids=["equal", "tenth", "nan", "sizes"],
)
def test_relative_error(output, expected):
    assert bench.relative_error(torch.tensor(output), torch.tensor([1.0, 4.0])) == pytest.approx(expected)


def test_a_wrong_output_is_exit_code_1(report, tmp_path, monkeypatch, capsys):
    (tmp_path / "net.py").write_text(SOURCE)
    monkeypatch.setattr(bench, "relative_error", lambda output, reference: 0.01)
    assert main(["bench", f"{tmp_path / 'net.py'}:make", "--keep", "1", "--against", "none", "--seconds", "0.01", "--threads", "1"]) == 1
    assert "differs from the reference by more than 0.001" in capsys.readouterr().err
