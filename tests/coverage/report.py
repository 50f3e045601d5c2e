"""Counts the coverage list and writes docs/models.md: `python tests/coverage/report.py [PATTERN ...]`; with patterns it only prints."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from survey import TOLERANCE, Coverage, survey  # noqa: E402
from zoo import ARCHITECTURES  # noqa: E402


def line_of(c: Coverage) -> str:
    if c.error:
        return f"{c.name}: does not wrap: {c.error}"
    ops = ", ".join(f"{name} {count}" for name, count in c.torch_ops.items())
    return (
        f"{c.name}: {c.macs / 1e6:.1f} MMAC, level 0 {c.level_0:.1e}, gated {c.gated:.1e}, {c.sites} sites, gateable {c.gateable:.0%}, "
        f"{c.torch_steps}/{c.steps} steps and {c.torch_macs:.1%} of MACs in PyTorch ({ops}), {c.seconds:.1f} s"
    )


def main() -> None:
    patterns = sys.argv[1:]
    chosen = [a for a in ARCHITECTURES if not patterns or any(fnmatch(a.name, p) or a.source == p for p in patterns)]
    results = []
    for architecture in chosen:
        try:
            results.append(survey(architecture))
        except Exception as error:
            results.append(Coverage(architecture.name, architecture.source, error=f"in a call: {type(error).__name__}: {error}"))
        print("" if results[-1].is_equal else "UNEQUAL ", line_of(results[-1]), sep="", flush=True)


if __name__ == "__main__":
    main()
