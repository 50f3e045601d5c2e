"""How a pruning is spread over rounds: how much of the way is gone after each."""

from __future__ import annotations

from dynprune.errors import InputError

SCHEDULES = ("one_shot", "linear", "cubic")


def shares(schedule: str, steps: int) -> list[float]:
    """Returns the share of the whole pruning that is done after each round, ascending, the last 1.

    "one_shot" is one round; "linear" adds the same in each; "cubic" takes most at first, 1 - (1 - t)^3 (Zhu & Gupta 2017, arXiv
    1710.01878).

    Raises:
        InputError: an unknown schedule, or `steps` below 1, or other than 1 for "one_shot".
    """
    if schedule not in SCHEDULES:
        raise InputError(f"`schedule` must be one of {SCHEDULES}, got {schedule!r}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"`steps` must be an int >= 1, got {steps!r}.")
    if schedule == "one_shot":
        if steps != 1:
            raise InputError(f"schedule='one_shot' is one round, got steps={steps}; choose 'linear' or 'cubic'.")
        return [1.0]
    times = [(i + 1) / steps for i in range(steps)]
    return times if schedule == "linear" else [1 - (1 - t) ** 3 for t in times]
