"""The trained networks in zoo/ are what their tables say, without training anything."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dynprune import DynamicModel

ZOO = Path(__file__).resolve().parents[2] / "zoo"
TABLES = sorted(ZOO.glob("resnet*.json"))


@pytest.fixture(scope="module")
def evaluation() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ZOO))
        spec = importlib.util.spec_from_file_location("zoo_evaluate", ZOO / "evaluate.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=TABLES, ids=lambda path: path.stem)
def trained(request, data) -> tuple[DynamicModel, dict, torch.Tensor, torch.Tensor]:
    path = request.param
    dm = DynamicModel.load(path.with_suffix(".safetensors"), data.network(f"cifar_{path.stem}"), remeasure=False).eval()
    images, labels = data.cifar10("test")
    return dm, json.loads(path.read_text()), data.cifar_input(images), torch.from_numpy(labels)


def test_engine_runs_all_of_it_and_agrees_with_pytorch(trained):
    dm, table, inputs, _ = trained
    assert all(step.torch_call is None for step in dm.plan.steps)
    with torch.no_grad():
        for row in table["rows"]:
            dm.level = row["level"]
            want, masks = dm.attachment.run((inputs[:50],), level=row["level"])
            got = dm.run_with_active(inputs[:50], active={name: [m.nonzero()[:, 0].tolist() for m in mask] for name, mask in masks.items()})
            assert (got - want).abs().max() <= 1e-4 * want.abs().max(), row


def test_first_images_are_as_accurate_as_the_table_says(trained, evaluation):
    dm, table, inputs, labels = trained
    row = table["rows"][-1]
    got = evaluation.evaluate(dm, inputs[:500], labels[:500], row["level"])
    assert got["accuracy"] == pytest.approx(row["accuracy"], abs=4) and got["macs"] == pytest.approx(row["macs"], abs=0.02)


@pytest.mark.slow
def test_rows_of_the_table(trained, evaluation):
    dm, table, inputs, labels = trained
    assert len(labels) == table["images"]
    for row in table["rows"]:
        got = evaluation.evaluate(dm, inputs, labels, row["level"])
        assert got["macs"] <= row["bar"], row
        assert got["macs"] == pytest.approx(row["macs"], abs=1e-3) and got["accuracy"] == pytest.approx(row["accuracy"], abs=0.1), row
