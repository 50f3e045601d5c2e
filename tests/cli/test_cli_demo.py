"""The demo: its parts on made-up figures, and the whole of it with a tiny network."""

from __future__ import annotations

import json

import pytest
import torch

from dynprune.cli import main
from dynprune.cli.demo import Served, accuracy, budgets_ms


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_accuracy():
    assert accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), torch.tensor([1, 0, 0])) == pytest.approx(2 / 3)


def test_budgets_fall_from_above_the_dense_time():
    sweep = [Served(None, level, 0.0, 1.0, p50_ms, p50_ms, None, {}) for level, p50_ms in ((0.0, 4.0), (0.5, 2.0), (1.0, 1.0))]
    assert budgets_ms(sweep) == pytest.approx((6.0, 3.0, 2.2))


def test_without_its_packages_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "needs scikit-learn, matplotlib, rich, not installed here; run: pip install 'dynprune[demo]'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_the_whole_demo_in_small(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert main(["demo", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "demo.json").read_text())
    assert [row["level"] for row in results["sweep"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    skip_rates = [row["skip_rate"] for row in results["sweep"]]
    assert skip_rates == sorted(skip_rates)
    assert skip_rates[0] == pytest.approx(0, abs=1e-6)
    assert results["dense_accuracy"] > 0.5
    assert results["sweep"][0]["accuracy"] == pytest.approx(results["dense_accuracy"])
    assert len(results["budgets"]) == 3
    assert all(0 <= row["misses"] <= 1 and row["against"]["eager"] > 0 for row in results["budgets"])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo.txt").read_text().strip() in capsys.readouterr().out
