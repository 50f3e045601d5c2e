"""Every script in examples/ runs, and prints what its reader is told to expect."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PRINTS = {
    "quickstart": ["level 0.0: 0% of the multiply-adds skipped", "level 1.0: "],
    "latency_budget": ["budget ", " of 64 missed"],
    "given_lists": ["site '0': 32 groups", "largest difference"],
    "save_and_load": ["operating points"],
    "prune_static": ["multiply-adds: ", "level 1 skips ", "frozen: ", "masks: 9", "zeros, skipped"],
    "train_gates": ["varies", "level 0: ", "level 1: "],
}


@pytest.mark.filterwarnings("ignore:No level is expected to keep the budget:RuntimeWarning")
@pytest.mark.parametrize("name", PRINTS)
def test_example(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for expected in PRINTS[name]:
        assert expected in printed


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTS)
