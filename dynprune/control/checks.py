"""What a user may set: levels, budgets, percentiles."""

from __future__ import annotations

import math
import numbers

from dynprune.errors import InputError


def check_level(level: float) -> float:
    """Returns `level` as a float.

    Raises:
        InputError: it is not a number in [0, 1].
    """
    if not is_number(level) or not 0 <= level <= 1:
        raise InputError(f"`level` must be a number in [0, 1] (0 runs everything), got {level!r}.")
    return float(level)


def check_budget_ms(budget_ms: float) -> float:
    """Returns `budget_ms` as a float.

    Raises:
        InputError: it is not a finite number > 0.
    """
    if not is_number(budget_ms) or budget_ms <= 0:
        raise InputError(f"`budget_ms` must be a finite number of milliseconds > 0, got {budget_ms!r}.")
    return float(budget_ms)


def check_percentile(percentile: float) -> float:
    """Returns `percentile` as a float.

    Raises:
        InputError: it is not a number inside (0, 100).
    """
    if not is_number(percentile) or not 0 < percentile < 100:
        raise InputError(f"`percentile` must be a number inside (0, 100), such as 95, got {percentile!r}.")
    return float(percentile)


def is_number(value: object) -> bool:
    """Returns whether `value` is a finite real number; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
