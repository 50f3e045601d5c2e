"""Draws accuracy over multiply-adds and over time, from the tables that zoo/evaluate.py writes. Needs matplotlib.

python bench/plot_frontiers.py docs/images/resnet20.png "trained=zoo/resnet20.json" "calibrated=zoo/resnet20_calibrated.json"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="file to write; its ending picks the format")
    parser.add_argument("tables", nargs="+", help="NAME=FILE.json")
    args = parser.parse_args()
    figure = Figure(figsize=(8, 3.2), dpi=90, layout="constrained")
    over_macs, over_ms = figure.subplots(1, 2, sharey=True)
    for table in args.tables:
        name, _, path = table.partition("=")
        rows = json.loads(Path(path).read_text())["rows"]
        accuracy = [row["accuracy"] for row in rows]
        over_macs.plot([100 * row["macs"] for row in rows], accuracy, "o-", markersize=4, label=name)
        over_ms.plot([row["ms"] for row in rows], accuracy, "o-", markersize=4, label=name)
    over_macs.set(xlabel="multiply-adds, % of the whole network's (gates counted)", ylabel="accuracy on the test images, %")
    over_ms.set(xlabel="ms for one image")
    over_macs.legend()
    for axes in (over_macs, over_ms):
        axes.grid(alpha=0.3)
    args.image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.image)


if __name__ == "__main__":
    main()
