"""Measures a network with gates on the CIFAR-10 test images: accuracy, multiply-adds (with the gates') and time of one image, by level.

    python zoo/evaluate.py --depth 20 --file zoo/resnet20.safetensors --json zoo/resnet20.json

Levels are chosen by the frontier in the file, which was measured on held-out training images; the test images choose nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from cifar import load_module

from dynprune import DynamicModel
from dynprune.timing import measure_interleaved

BARS = (1.0, 0.9, 0.8, 0.75, 0.6, 0.5, 0.38)
"""Shares of the multiply-adds to stay below."""
MARGIN = 0.01
"""How far below, on the held-out images, so that others are likely to stay below too."""
BATCH = 100


def gate_share(dm: DynamicModel) -> float:
    """Returns the multiply-adds of all gates as a share of the model's."""
    gates = [dm.gate(site.name) for site in dm.plan.sites]
    return sum(gate.down.numel() + gate.up.numel() for gate in gates) / dm.plan.macs


def level_below(dm: DynamicModel, share: float) -> float | None:
    """Returns the lowest level that keeps at most `share` of the multiply-adds on the held-out images, gates counted; None: no level.

    Between the measured levels the share is taken to fall linearly.
    """
    skipped = 1 + gate_share(dm) - share
    for before, point in pairwise(dm.frontier.points):
        if point.skip_rate >= skipped:
            part = (skipped - before.skip_rate) / (point.skip_rate - before.skip_rate)
            return before.level + max(0.0, part) * (point.level - before.level)
    return None


@torch.no_grad()
def evaluate(dm: DynamicModel, inputs: torch.Tensor, labels: torch.Tensor, level: float) -> dict[str, float]:
    """Returns level, share of multiply-adds executed (gates counted) and accuracy in per cent."""
    dm.level = level
    dm.reset_stats()
    hits = sum(int((dm(x).argmax(1) == y).sum()) for x, y in zip(inputs.split(BATCH), labels.split(BATCH), strict=True))
    share = 1 - dm.stats().skip_rate + (gate_share(dm) if level else 0.0)
    return {"level": level, "macs": round(share, 4), "accuracy": round(100 * hits / len(labels), 2)}


@torch.no_grad()
def times_ms(dm: DynamicModel, inputs: torch.Tensor, levels: list[float]) -> list[float]:
    """Returns the median time of one image at each level, over 50 images in turn."""

    def run_at(level: float) -> Callable[[], object]:
        engine, turn = dm.engine_for(inputs[:1]), itertools.cycle(inputs[:50].split(1))
        return lambda: engine.run([next(turn)], level=level)

    measured = measure_interleaved({str(level): run_at(level) for level in levels}, seconds=0.3)
    return [round(measured[str(level)].median_ms, 4) for level in levels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data", help="folder with load.py")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--file", type=Path, required=True, help="what DynamicModel.save wrote")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    load = load_module(args.data)
    dm = DynamicModel.load(args.file, load.network(f"cifar_resnet{args.depth}"), remeasure=False).eval()
    images, classes = load.cifar10("test")
    inputs, labels = load.cifar_input(images), torch.from_numpy(classes)
    rows = []
    for bar in BARS:
        level = 0.0 if bar == 1 else level_below(dm, bar - MARGIN)
        if level is not None:
            rows.append({"bar": bar, **evaluate(dm, inputs, labels, level)})
            print(rows[-1], flush=True)
    for row, time_ms in zip(rows, times_ms(dm, inputs, [row["level"] for row in rows]), strict=True):
        row["ms"] = time_ms
    print(f"one image, {dm.num_threads} threads: {', '.join(str(row['ms']) for row in rows)} ms")
    if args.json:
        args.json.write_text(json.dumps({"images": len(labels), "threads": dm.num_threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
