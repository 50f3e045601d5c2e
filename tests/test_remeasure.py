"""The times of a calibrated model are measured again where its file comes from another machine; all else stays."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dynprune.errors import CalibrationError
from dynprune.runtime import remeasure
from dynprune.runtime.costs import CostTable
from dynprune.runtime.model import DynamicModel
from dynprune.training.calibrate import calibrate


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def in_a_moment(monkeypatch):
    monkeypatch.setattr(remeasure, "SECONDS", 1e-4)


@pytest.fixture(scope="module")
def dm() -> DynamicModel:
    dm = DynamicModel(models.build("basic"), models.example("basic"))
    calibrate(dm, [torch.randn(16, *models.example("basic")[0].shape[1:]) for _ in range(4)], levels=5)
    return dm


def saved_elsewhere(dm: DynamicModel, path: Path) -> None:
    """Saves `dm` as if it had been calibrated on another machine, where everything took a second."""
    points = tuple(dataclasses.replace(point, latency_ms=1e3, predicted_ms=1e3) for point in dm.frontier.points)
    here = dm.frontier
    dm.frontier = dataclasses.replace(here, points=points, machine="another machine")
    dm.save(path)
    dm.frontier = here


def test_calibration_knows_its_machine_and_threads(dm):
    assert dm.measured_here
    assert dm.frontier.num_threads == dm.num_threads
    assert [count for count, _ in dm.frontier.fewer_threads] == [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < dm.num_threads]


def test_a_file_of_another_machine_is_measured_again(dm, tmp_path):
    saved_elsewhere(dm, tmp_path / "dm")
    again = DynamicModel.load(tmp_path / "dm", models.build("basic"))
    assert again.measured_here and again.frontier.machine == dm.frontier.machine
    assert all(point.latency_ms < 500 for point in again.frontier.points)
    for kept in ("level", "skip_rate", "accuracy"):
        assert [getattr(p, kept) for p in again.frontier.points] == [getattr(p, kept) for p in dm.frontier.points]
    assert again.costs.fits(again.plan)
    np.testing.assert_array_equal(again.costs.work_share, dm.costs.work_share)
    assert again.costs.level_ms.sum(1) == pytest.approx([p.predicted_ms for p in again.frontier.points], rel=0.5)
    as_saved = DynamicModel.load(tmp_path / "dm", models.build("basic"), remeasure=False)
    assert not as_saved.measured_here and as_saved.frontier.latency_ms_at(0) == 1e3


def test_a_file_of_this_machine_is_taken_as_it_is(dm, tmp_path):
    dm.save(tmp_path / "dm")
    again = DynamicModel.load(tmp_path / "dm", models.build("basic"))
    assert again.frontier == dm.frontier
    np.testing.assert_array_equal(again.costs.site_share, dm.costs.site_share)


def test_inputs_let_the_gates_choose_and_the_budget_goes_on(dm):
    dm.set_latency_budget(ms=1e3)
    before = dm.frontier
    try:
        frontier = dm.remeasure(*models.example("basic"))
        assert dm.frontier is frontier and frontier is not before
        dm(*models.example("basic"))
        assert dm.stats().budget_ms == 1e3
    finally:
        dm.set_latency_budget(None)
        dm.set_frontier(before, dm.costs)


def test_what_cannot_be_measured_again_is_refused(dm):
    plain = DynamicModel(models.build("basic"), models.example("basic"))
    assert not plain.measured_here
    with pytest.raises(CalibrationError, match="calibrate"):
        plain.remeasure()
    with pytest.raises(CalibrationError, match="shape"):
        dm.remeasure(torch.randn(1, 3, 40, 40))
    costs = dm.costs
    dm.costs = CostTable(costs.fixed_ms, costs.scaled_ms, costs.level_ms, costs.signature)
    try:
        with pytest.raises(CalibrationError, match="calibrate it again"):
            dm.remeasure()
    finally:
        dm.costs = costs


def test_files_of_before_are_read(dm, tmp_path):
    """Without shares of the levels, and with a frontier that knows no threads."""
    from safetensors import safe_open

    saved_elsewhere(dm, tmp_path / "dm")
    with safe_open(tmp_path / "dm", "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.endswith("_share")}  # noqa: SIM118 - not a dict
    save_file(tensors, tmp_path / "old", about)
    old = DynamicModel.load(tmp_path / "old", models.build("basic"))
    assert not old.measured_here and old.costs.run_share is None
    old(*models.example("basic"))
