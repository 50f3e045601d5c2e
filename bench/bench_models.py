"""Runs `dynprune bench` on several models and keeps the reports in bench/results/.

python bench/bench_models.py torchvision:resnet50 torchvision:mobilenet_v2 --seconds 3
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

MODELS = ("torchvision:resnet18", "torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:efficientnet_b0", "torchvision:vgg11_bn")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Further options go to `dynprune bench`.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default {' '.join(MODELS)}")
    arguments, options = parser.parse_known_args()
    RESULTS.mkdir(exist_ok=True)
    failed = []
    for model in arguments.models or MODELS:
        report = RESULTS / (re.sub(r"[^\w.-]+", "_", model) + ".json")
        # A process each: compiled rivals, thread pools and memory of one model do not weigh on the next.
        done = subprocess.run([sys.executable, "-m", "dynprune.cli", "bench", model, "--json", str(report), *options])
        failed += [model] if done.returncode else []
        print(flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
