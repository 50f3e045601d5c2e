"""How calibration and training tell how far they are."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Report = Callable[[float, str], None]
"""Called with the share done in [0, 1] and what is done now."""

LEAST_SECONDS = 0.2
"""Between two lines of an epoch."""


def reporter(progress: bool | Report, verb: str) -> Report:
    """Returns what to call with (share done, what): `progress` itself, one that writes a line to stderr (True), or none (False)."""
    if callable(progress):
        return progress
    if not progress:
        return lambda share, what: None
    return lambda share, what: print(f"\r{verb} {share:4.0%} {what:<60.60}", end="\n" if share >= 1 else "", file=sys.stderr, flush=True)


def part_of(report: Report, first: float, last: float) -> Report:
    """Returns a report whose shares from 0 to 1 are `first` to `last` of the whole."""
    return lambda share, what: report(first + (last - first) * share, what)


def epoch_report(report: Report, epoch: int, epochs: int, steps: int) -> Callable[[int, dict[str, float]], None]:
    """Returns what to call after each step of an epoch with the number of steps done and the means of the loss terms so far."""
    last = 0.0

    def after_step(count: int, means: dict[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LEAST_SECONDS or count >= steps:
            last = now
            terms = " ".join(f"{name} {value:.3f}" for name, value in means.items())
            report(min(1.0, (epoch + count / steps) / epochs), f"epoch {epoch + 1}/{epochs} step {count}/{steps} {terms}")

    return after_step
