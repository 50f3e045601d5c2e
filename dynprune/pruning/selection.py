"""Which classes go: a share of every space, or the least of all spaces together, or as many as a cost allows."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dynprune.errors import InputError

SCOPES = ("global", "local")


@dataclass(frozen=True, eq=False)
class Candidate:
    """The classes of one space, ready to be chosen from.

    Attributes:
        name: of the space.
        scores: (size,) f64, higher stays longer.
        least: how many have to stay.
        multiple: the number that stay is rounded up to a multiple of this.
        whole: how many there were before the first round.
    """

    name: str
    scores: np.ndarray
    least: int
    multiple: int
    whole: int

    def count(self, wanted: float) -> int:
        """Returns the number to keep that is nearest above `wanted` and allowed."""
        rounded = math.ceil(max(wanted, self.least) / self.multiple - 1e-9) * self.multiple
        return min(len(self.scores), rounded)

    def best(self, count: int) -> np.ndarray:
        """Returns a mask (size,) of the `count` classes with the highest scores; of equal ones the first stay."""
        mask = np.zeros(len(self.scores), bool)
        mask[np.argsort(-self.scores, kind="stable")[:count]] = True
        return mask


def least_kept(name: str, size: int, floor: float | Mapping[str, float]) -> int:
    """Returns how many classes of a space have to stay: the share of `floor`, at least one.

    Raises:
        InputError: a share is not in [0, 1].
    """
    shares = floor if isinstance(floor, Mapping) else {"*": floor}
    matching = [share for pattern, share in shares.items() if fnmatch.fnmatchcase(name, pattern)]
    for share in shares.values():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise InputError(f"`floor` must be a share in [0, 1], or a dict of them by pattern, got {floor!r}.")
    return max(1, math.ceil(max(matching, default=0.0) * size - 1e-9))


def select(candidates: Sequence[Candidate], keep_ratio: float, scope: str) -> dict[str, np.ndarray]:
    """Returns a mask of the classes that stay, by space.

    Args:
        candidates: what there is to choose from.
        keep_ratio: share of the classes to keep, in [0, 1], of those before the first round: of each space ("local") or of all
            together ("global").
        scope: "global" compares scores relative to the mean of their space.
    """
    if scope == "local":
        return {c.name: c.best(c.count(round(keep_ratio * c.whole, 9))) for c in candidates}
    relative = [c.scores / max(c.scores.mean(), 1e-30) for c in candidates]
    owners = np.concatenate([np.full(len(scores), i) for i, scores in enumerate(relative)])
    kept = [len(scores) for scores in relative]
    to_remove = len(owners) - round(keep_ratio * sum(c.whole for c in candidates))
    for flat in np.argsort(np.concatenate(relative), kind="stable"):
        if to_remove <= 0:
            break
        owner = owners[flat]
        if kept[owner] > candidates[owner].least:
            kept[owner] -= 1
            to_remove -= 1
    return {c.name: c.best(c.count(count)) for c, count in zip(candidates, kept, strict=True)}


def largest_ratio(fits: Callable[[float], bool], *, steps: int = 24) -> float | None:
    """Returns the largest keep ratio in [0, 1] that fits, found by halving; None where not even 0 does."""
    if fits(1.0):
        return 1.0
    if not fits(0.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
