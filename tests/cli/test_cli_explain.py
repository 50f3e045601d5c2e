"""`dynprune explain` prints the plan of a model."""

from __future__ import annotations

from dynprune.cli import main


def test_explain_names_steps_and_sites(tmp_path, capsys):
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))\n"
    )
    assert main(["explain", f"{path}:make", "--shape", "3,16,16"]) == 0
    printed = capsys.readouterr().out
    assert "conv" in printed
    assert "engine" in printed
