"""`prune`: a physically smaller copy of a model, to a share of its channels, a number of multiply-adds, or a latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.errors import InputError, UnsupportedModelError
from dynprune.graph.capture import capture
from dynprune.graph.macs import count_macs
from dynprune.pruning.criteria import CRITERIA, Criterion, first_order, score_space
from dynprune.pruning.evidence import Evidence, Loss
from dynprune.pruning.latency import RUNTIMES, measure_ms
from dynprune.pruning.recipe import Recipe, copy_model
from dynprune.pruning.report import Cut, PruneReport
from dynprune.pruning.residuals import Residual, find_residuals, score_residuals
from dynprune.pruning.schedule import shares
from dynprune.pruning.selection import SCOPES, Candidate, largest_ratio, least_kept, select
from dynprune.pruning.spaces import KINDS, Anatomy, Space, choose_names
from dynprune.pruning.surgery import check, compensate_, cut, make_recipe, removed_atoms
from dynprune.training.samples import Chunk, read_samples

BRANCHES = "branches"
LATENCY_STEPS = 7
"""Models that are built and timed to find the largest one that meets `target_ms`; each halves what is left of the interval."""
CHECK_ROUNDS = 4


def prune(
    model: nn.Module,
    example_inputs: Tensor | tuple | Mapping[str, Any],
    *,
    keep_ratio: float | None = None,
    target_macs: float | None = None,
    target_ms: float | None = None,
    criterion: str | Criterion = "l2",
    scope: str = "global",
    structures: Sequence[str] = ("channels", "neurons", "heads"),
    coupled: bool = False,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    round_to: int = 1,
    floor: float | Mapping[str, float] = 0.1,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    compensate: bool = True,
    schedule: str = "one_shot",
    steps: int = 1,
    finetune: Callable[[nn.Module], Any] | None = None,
    runtime: str = "engine",
    seed: int = 0,
    measure: bool = True,
) -> tuple[nn.Module, PruneReport]:
    """Returns a smaller copy of `model`, a plain module of the same classes, and a report. The model itself stays as it is.

    Which channels go together is found on the captured model, through any concatenations, splits and shuffles (DepGraph, Fang et al.
    2023, arXiv 2301.12900). The result is checked on the example inputs: it computes what the original does with the removed channels
    masked. What does not pass is left whole, and `report.refused` says why.

    Args:
        model: any module that `DynamicModel` takes.
        example_inputs: of one call: a tensor, a tuple of arguments, or a dict of keyword arguments.
        keep_ratio: share of the channels, neurons and heads to keep, in [0, 1].
        target_macs: multiply-adds of one sample to stay within; up to 1 a share of the model's.
        target_ms: milliseconds of a call with `example_inputs` to stay within, on this machine and `torch.get_num_threads()` threads.
            Exactly one of these three must be given.
        criterion: "l1", "l2", "bn_scale", "fpgm", "taylor", "activation", "random" (see `dynprune.pruning.criteria`), or a callable
            (space, evidence) -> one score per class, higher stays.
        scope: "global" ranks all spaces together, scores relative to the mean of their space; "local" cuts every space alike.
        structures: of "channels", "neurons", "heads", "branches".
        coupled: also cut the channels of residual streams, in all the layers that they tie together.
        include, exclude: shell patterns of space names (`report.cuts`): what may be cut.
        round_to: the channels that stay are rounded up to a multiple of this; heads and branches are not rounded.
        floor: least share of a space that stays, or a dict of shares by pattern; at least one channel always does.
        data: batches as the model takes them, with labels if there is a `loss`; at most 1024 samples are read.
        loss: (output, labels) -> scalar tensor. With data, the report has the loss before and after.
        compensate: with data, the mean of what a removed channel gave goes into the biases of the layers that read it.
        schedule, steps: "one_shot", or "linear" or "cubic" over `steps` rounds.
        finetune: called with the smaller model after each round; it trains it in place.
        runtime: what `target_ms` and the report's times are measured with: "engine" or "eager".
        seed: of criterion="random".
        measure: whether the report has times.

    Raises:
        InputError: an argument does not fit, or a target cannot be met; the message names the nearest.
        CalibrationError: the criterion needs data or gradients that are not there, or the data is empty or holds NaN.
        UnsupportedModelError: the model cannot be captured, or nothing in it can be cut.

    Example:
        >>> small, report = prune(resnet18, torch.rand(1, 3, 224, 224), target_macs=0.5, criterion="activation", data=loader)
        >>> print(report)
    """
    goal = _check_goal(keep_ratio, target_macs, target_ms)
    _check_choices(scope, structures, round_to, runtime, criterion, finetune)
    progress = shares(schedule, steps)
    call = _call(example_inputs)
    chunks = _read(data, loss, len([x for x in (*call[0], *call[1].values()) if isinstance(x, Tensor)]))
    options = _Options(criterion, scope, frozenset(structures), coupled, include, exclude, round_to, floor, compensate, runtime, seed)
    first = _Round(copy_model(model), call, options, chunks, loss)
    times_wanted = measure or target_ms is not None
    ms_before = measure_ms(model, *call, runtime=runtime) if times_wanted else None
    now, small, recipe, predicted = first, first.model, Recipe(), None
    for number, share in enumerate(progress):
        if number:
            now = _Round(small, call, options, chunks, loss, first)
        small, made = now.build(lambda now=now, share=share: _ratio(now, goal, share, first, ms_before))
        recipe = recipe.then(made)
        predicted = now.predicted_loss()
        if finetune is not None:
            finetune(small)
    report = PruneReport(
        cuts=first.cuts(now),
        refused=tuple(dict.fromkeys((*first.refused, *now.refused))),
        keep_ratio=now.share_kept,
        params_before=_parameters(model),
        params_after=_parameters(small),
        macs_before=first.macs(1.0),
        macs_after=sum(count_macs(capture(small, *call)).values()),
        recipe=recipe,
        ms_before=ms_before,
        ms_after=measure_ms(small, *call, runtime=runtime) if times_wanted else None,
        runtime=runtime,
        loss_before=first.loss_before,
        loss_after=Evidence(small, chunks, loss).mean_loss() if first.loss_before is not None else None,
        predicted_loss=predicted if len(progress) == 1 else None,
    )
    return small, report


@dataclass(frozen=True)
class _Options:
    criterion: str | Criterion
    scope: str
    structures: frozenset[str]
    coupled: bool
    include: Sequence[str]
    exclude: Sequence[str]
    round_to: int
    floor: float | Mapping[str, float]
    compensate: bool
    runtime: str
    seed: int


class _Round:
    """One pruning of one model: what there is to choose from, and the smaller models of different ratios.

    Attributes:
        least, whole: how many classes each space has to keep, and had; those of the first round.
        share_kept: of the classes that there were before the first round, after `build`.
        refused: (layer, reason).
    """

    def __init__(
        self, model: nn.Module, call: tuple, options: _Options, chunks: list[Chunk], loss: Loss | None, first: _Round | None = None
    ):
        self.model, self.call, self.options = model, call, options
        self.evidence = Evidence(model, chunks, loss, options.seed)
        self.loss_before = self.evidence.mean_loss() if loss is not None and chunks else None
        self.anatomy = Anatomy(capture(model, *call), coupled=options.coupled)
        self.refused = list(self.anatomy.refused)
        self.least: dict[str, int] = {} if first is None else first.least
        self.whole: dict[str, int] = {} if first is None else first.whole
        self.share_kept = 1.0
        self._sizes: dict[str, tuple[str, int, int]] = {}
        self.spaces, self.residuals = self._places()
        self._score()
        self._removed: set[int] = set()

    def _places(self) -> tuple[list[Space], list[Residual]]:
        wanted = self.options.structures | ({"coupled"} if self.options.coupled else set())
        spaces = [space for space in self.anatomy.spaces if space.kind in wanted]
        residuals: list[Residual] = []
        if BRANCHES in wanted:
            residuals, without = find_residuals(self.anatomy.graph, self.anatomy.macs)
            self.refused += without
        names = [*(space.name for space in spaces), *(residual.name for residual in residuals)]
        if not names:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused[:3])
            raise UnsupportedModelError(f"Nothing in this model can be cut with structures={sorted(wanted)}. {reasons}")
        chosen = set(self.least) or choose_names(names, self.options.include, self.options.exclude)
        self.refused += [(name, "left out by `include` or `exclude`") for name in names if name not in chosen]
        return [space for space in spaces if space.name in chosen], [residual for residual in residuals if residual.name in chosen]

    def _score(self) -> None:
        o = self.options
        self.candidates = []
        for space in self.spaces:
            least = self.least.setdefault(space.name, least_kept(space.name, space.size, o.floor))
            multiple, whole = 1 if space.kind == "heads" else o.round_to, self.whole.setdefault(space.name, space.size)
            self.candidates.append(Candidate(space.name, score_space(o.criterion, space, self.evidence), least, multiple, whole))
        if self.residuals:
            scores = score_residuals(o.criterion, self.residuals, self.evidence)
            for residual in self.residuals:
                self.least.setdefault(residual.name, 0)
            share = o.floor if isinstance(o.floor, int | float) else max((v for k, v in o.floor.items() if k == BRANCHES), default=0.0)
            whole = self.whole.setdefault(BRANCHES, len(scores))
            self.candidates.append(Candidate(BRANCHES, scores, math.ceil(share * whole), 1, whole))

    def choose(self, ratio: float) -> tuple[set[int], list[Residual]]:
        """Returns the classes and branches that go at a keep ratio."""
        kept = select(self.candidates, ratio, self.options.scope)
        gone = [r for r, stays in zip(self.residuals, kept.get(BRANCHES, ()), strict=True) if not stays] if self.residuals else []
        return removed_atoms(self.spaces, kept), gone

    def macs(self, ratio: float) -> int:
        """Returns the multiply-adds of one sample at a keep ratio."""
        removed, gone = self.choose(ratio)
        return self.anatomy.macs_after(removed, frozenset().union(*(residual.nodes for residual in gone)))

    def build(self, ratio_of: Callable[[], float]) -> tuple[nn.Module, Recipe]:
        """Returns the smaller model, checked, and its recipe; places that do not pass are refused and left whole.

        Args:
            ratio_of: returns the keep ratio; asked again whenever a place was refused, as the others then have to give more.

        Raises:
            UnsupportedModelError: the smaller model does not work though every place alone does.
        """
        for _ in range(CHECK_ROUNDS):
            removed, gone = self.choose(ratio_of())
            recipe = make_recipe(self.anatomy, removed, gone, self.model)
            small = cut(self.model, recipe)
            problem = check(self.model, small, self.spaces, removed, gone, self.call)
            if problem is None:
                return self._finish(small, recipe, removed, gone)
            if not self._refuse_culprits(removed, gone):
                break
        raise UnsupportedModelError(f"The smaller model does not work: {problem}. Leave layers out with `exclude`.")

    def _refuse_culprits(self, removed: set[int], gone: list[Residual]) -> bool:
        """Tries every place alone and refuses those that do not pass; returns whether there were any."""
        culprits = {}
        for space in self.spaces:
            own = removed & {int(atom) for atom in space.atoms}
            if own:
                culprits[space.name] = self._try(own, [])
        culprits |= {residual.name: self._try(set(), [residual]) for residual in gone}
        bad = {name: problem for name, problem in culprits.items() if problem is not None}
        self.refused += list(bad.items())
        self.spaces = [space for space in self.spaces if space.name not in bad]
        self.candidates = [c for c in self.candidates if c.name not in bad]
        keep = [residual.name not in bad for residual in self.residuals]
        lost = len(keep) - sum(keep)
        self.candidates = [replace(c, scores=c.scores[keep], whole=c.whole - lost) if c.name == BRANCHES else c for c in self.candidates]
        self.residuals = [residual for residual, stays in zip(self.residuals, keep, strict=True) if stays]
        self.candidates = [c for c in self.candidates if len(c.scores)]
        if bad and not self.candidates:
            raise UnsupportedModelError(f"Nothing in this model can be cut: {'; '.join(f'{n}: {p}' for n, p in list(bad.items())[:3])}.")
        return bool(bad)

    def _try(self, removed: set[int], gone: list[Residual]) -> str | None:
        small = cut(self.model, make_recipe(self.anatomy, removed, gone, self.model))
        return check(self.model, small, self.spaces, removed, gone, self.call)

    def _finish(self, small: nn.Module, recipe: Recipe, removed: set[int], gone: list[Residual]) -> tuple[nn.Module, Recipe]:
        self._removed = removed
        stays = sum(len(c.scores) for c in self.candidates) - len(removed) - len(gone)
        self.share_kept = stays / sum(c.whole for c in self.candidates)
        self._sizes = {s.name: (s.kind, s.size, s.size - sum(int(a) in removed for a in s.atoms)) for s in self.spaces}
        self._sizes |= {residual.name: (BRANCHES, 1, 0) for residual in gone}
        if self.options.compensate and self.evidence.chunks:
            recipe = compensate_(small, self.evidence, self.spaces, removed, recipe)
        return small, recipe

    def predicted_loss(self) -> float | None:
        """Returns the first-order estimate of the loss after what `build` removed; None without data and loss."""
        if self.loss_before is None:
            return None
        lost = 0.0
        for space in self.spaces:
            gone = np.array([int(atom) in self._removed for atom in space.atoms])
            lost += float(np.mean([first_order(space, products)[gone].sum() for products in self.evidence.products()]))
        return self.loss_before - lost

    def cuts(self, last: _Round) -> tuple[Cut, ...]:
        """Returns what became of this round's places by the end of round `last`."""
        rows = []
        for name, (kind, before, after) in self._sizes.items():
            rows.append(Cut(name, kind, before, last._sizes[name][2] if name in last._sizes else after))
        return (*rows, *(Cut(n, k, b, a) for n, (k, b, a) in last._sizes.items() if n not in self._sizes))


def _ratio(now: _Round, goal: tuple[str, float], share: float, first: _Round, ms_before: float | None) -> float:
    """Returns the keep ratio of a round that has to be `share` of the way."""
    kind, value = goal
    if kind == "keep_ratio":
        return 1 - (1 - value) * share
    if kind == "target_macs":
        whole = first.macs(1.0)
        target = whole - (whole - (value * whole if value <= 1 else value)) * share
        ratio = largest_ratio(lambda r: now.macs(r) <= target)
        if ratio is None:
            raise InputError(
                f"target_macs={value:g} cannot be met: the nearest is {now.macs(0.0)} of {whole}; lower `floor`, or allow more structures."
            )
        return ratio
    target = ms_before - (ms_before - value) * share
    return _ratio_for_ms(now, target, value)


def _ratio_for_ms(now: _Round, target: float, asked: float) -> float:
    """Returns the largest keep ratio whose model takes at most `target` milliseconds."""
    timed: dict[float, float] = {}

    def fits(ratio: float) -> bool:
        if ratio == 1.0:
            small = now.model
        else:
            small, _ = now.build(lambda: ratio)
        timed[ratio] = measure_ms(small, *now.call, runtime=now.options.runtime)
        return timed[ratio] <= target

    ratio = largest_ratio(fits, steps=LATENCY_STEPS)
    if ratio is None:
        raise InputError(
            f"target_ms={asked:g} cannot be met on this machine with runtime={now.options.runtime!r}: the nearest is {timed[0.0]:.3g} ms; "
            "lower `floor`, or allow more structures."
        )
    return ratio


def _check_goal(keep_ratio: float | None, target_macs: float | None, target_ms: float | None) -> tuple[str, float]:
    goals = {"keep_ratio": keep_ratio, "target_macs": target_macs, "target_ms": target_ms}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        raise InputError(f"Give exactly one of keep_ratio, target_macs and target_ms, got {sorted(given) or 'none'}.")
    (name, value), *_ = given.items()
    number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not number or value < 0 or (name == "keep_ratio" and value > 1) or (name != "keep_ratio" and value == 0):
        raise InputError(f"`{name}` must be {'a share in [0, 1]' if name == 'keep_ratio' else 'a number > 0'}, got {value!r}.")
    return name, float(value)


def _check_choices(scope: str, structures: Sequence[str], round_to: int, runtime: str, criterion: Any, finetune: Any) -> None:
    if scope not in SCOPES:
        raise InputError(f"`scope` must be one of {SCOPES}, got {scope!r}.")
    known = [kind for kind in KINDS if kind != "coupled"]
    if isinstance(structures, str) or not structures or not set(structures) <= set(known):
        raise InputError(f"`structures` must be a non-empty list of {known}, got {structures!r}.")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise InputError(f"`round_to` must be an int >= 1, got {round_to!r}.")
    if runtime not in RUNTIMES:
        raise InputError(f"`runtime` must be one of {RUNTIMES}, got {runtime!r}.")
    if not callable(criterion) and criterion not in CRITERIA:
        raise InputError(f"`criterion` must be a callable or one of {sorted(CRITERIA)}, got {criterion!r}.")
    if finetune is not None and not callable(finetune):
        raise InputError(f"`finetune` must be a callable that takes the smaller model, got {type(finetune).__name__}.")


def _call(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def _read(data: Iterable[Any] | None, loss: Loss | None, num_inputs: int) -> list[Chunk]:
    if loss is not None and not callable(loss):
        raise InputError(f"`loss` must be a callable (output, labels) -> tensor, got {type(loss).__name__}.")
    return [] if data is None else read_samples(data, labelled=loss is not None, num_inputs=num_inputs)


def _parameters(model: nn.Module) -> int:
    with torch.no_grad():
        return sum(parameter.numel() for parameter in model.parameters())
