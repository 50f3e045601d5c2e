"""`dynprune demo`: the whole way on real data that needs no network: train, wrap, calibrate, sweep levels, keep three budgets."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dynprune.cli.machine import Machine, describe_machine
from dynprune.cli.models import positive_int
from dynprune.cli.rivals import Rival, built_rivals
from dynprune.cli.table import format_table
from dynprune.errors import InputError

if TYPE_CHECKING:
    from dynprune.cli.demo_digits import Digits
    from dynprune.runtime.model import DynamicModel

SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0)
CALIBRATION_IMAGES = 400
CALIBRATION_BATCH = 50
WARM_UP_IMAGES = 20
PASSES = 4
"""Over the test images, at every level and budget: a machine that others use too is slower for tenths of a second at times."""
_NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}

Stage = Callable[[str], contextlib.AbstractContextManager[Callable[[float], None]]]


@dataclass(frozen=True)
class Served:
    """What serving the test images one by one gave.

    Attributes:
        budget_ms: that was set; None where the level was.
        level: mean over the images.
        skip_rate: share of the model's multiply-adds not executed.
        accuracy: share of the test images classified rightly.
        p50_ms, p95_ms: of the time per image.
        misses: share of the images that took longer than the budget; None without one.
        against: rival to its median time / this model's, measured in turns; empty in the sweep.
    """

    budget_ms: float | None
    level: float
    skip_rate: float
    accuracy: float
    p50_ms: float
    p95_ms: float
    misses: float | None
    against: dict[str, float]


@dataclass(frozen=True)
class Results:
    """All that the demo measured.

    Attributes:
        machine: that it was measured on.
        train_images, test_images: how many.
        dense_accuracy: share of the test images that the whole network classifies rightly in PyTorch.
        dense_ms: rival to its median time per image.
        unavailable: rival to why it has no time.
        sweep: one row per level of `SWEEP`.
        budgets: one row per budget.
        notes: what `DynamicModel` warned of, such as a budget out of reach.
    """

    machine: Machine
    train_images: int
    test_images: int
    dense_accuracy: float
    dense_ms: dict[str, float]
    unavailable: dict[str, str]
    sweep: tuple[Served, ...]
    budgets: tuple[Served, ...]
    notes: tuple[str, ...]


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the verb `demo`."""
    parser = verbs.add_parser("demo", help="train a small network, wrap it, calibrate it, and keep three latency budgets")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path("demo-output"), help="for the plot and the figures; default demo-output"
    )
    parser.add_argument("--threads", metavar="N", type=positive_int, help="default: torch's number here")
    parser.add_argument("--quick", action="store_true", help="a tiny network and little training: shows that everything runs, not how well")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the results, writes them and the plot to --out; returns 0."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"the demo needs {', '.join(missing)}, not installed here; run: pip install 'dynprune[demo]'.")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: folder {str(arguments.out)!r} cannot be made: {error.strerror}.") from error
    import torch

    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    with progress_bars() as stage:
        results = demonstrate(stage, quick=arguments.quick)

    from dynprune.cli.demo_plot import plot

    plot(results, arguments.out / "demo.png")
    text = results_text(results)
    (arguments.out / "demo.txt").write_text(text + "\n")
    (arguments.out / "demo.json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    print(f"\n{text}\n\nPlot: {arguments.out / 'demo.png'}   Figures: {arguments.out / 'demo.json'}")
    return 0


def demonstrate(stage: Stage, *, quick: bool) -> Results:
    """Returns what the demo measured, on torch's present number of threads.

    Args:
        stage: opens a progress bar of a given name; its callback takes the share done.
        quick: a tiny network and little training.
    """
    import torch

    from dynprune.cli.demo_digits import EPOCH_SIZES, ResidualNet, load_digits, train
    from dynprune.runtime.model import DynamicModel
    from dynprune.training.calibrate import calibrate

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    digits = load_digits()
    example = digits.test_images[:1]
    model = ResidualNet(width=8) if quick else ResidualNet()
    with stage("training a residual network") as done:
        train(model, digits, EPOCH_SIZES[:3] + EPOCH_SIZES[-1:] if quick else EPOCH_SIZES, done)
    with stage("wrapping it") as done:
        dm = DynamicModel(model, example).eval()
    with stage("calibrating gates and times") as done:
        images, labels = digits.train_images[:CALIBRATION_IMAGES], digits.train_labels[:CALIBRATION_IMAGES]
        batches = zip(images.split(CALIBRATION_BATCH), labels.split(CALIBRATION_BATCH), strict=True)
        calibrate(dm, list(batches), metric=accuracy, progress=lambda share, _: done(share))
    with stage("sweeping levels") as done:
        sweep = []
        for count, level in enumerate(SWEEP, start=1):
            dm.level = level
            sweep.append(serve(dm, digits))
            done(count / len(SWEEP))
    with (
        stage("keeping three budgets beside the rivals") as done,
        built_rivals(("eager", "onnxruntime"), model, (example,), threads) as rivals,
    ):
        budgets = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for count, budget_ms in enumerate(budgets_ms(sweep), start=1):
                dm.set_latency_budget(budget_ms)
                served = serve(dm, digits)
                dense_ms, against = compare(dm, digits, rivals, seconds=0.3 if quick else 2.0)
                budgets.append(replace(served, against=against))
                done(count / 3)
    with torch.inference_mode():
        dense_accuracy = accuracy(model(digits.test_images), digits.test_labels)
    return Results(
        machine=describe_machine(threads),
        train_images=len(digits.train_labels),
        test_images=len(digits.test_labels),
        dense_accuracy=dense_accuracy,
        dense_ms=dense_ms,
        unavailable={rival.name: rival.reason for rival in rivals if rival.run is None},
        sweep=tuple(sweep),
        budgets=tuple(budgets),
        notes=tuple(dict.fromkeys(str(warning.message) for warning in caught)),
    )


def serve(dm: DynamicModel, digits: Digits) -> Served:
    """Returns what comes of the test images when `dm` classifies them one by one, `PASSES` times over, as it is set now."""
    import torch

    levels, right = [], 0
    with torch.inference_mode():
        for image in digits.test_images[:WARM_UP_IMAGES].split(1):
            dm(image)
        dm.reset_stats()
        for _ in range(PASSES):
            for image, label in zip(digits.test_images.split(1), digits.test_labels, strict=True):
                right += int(dm(image).argmax() == label)
                levels.append(dm.level)
    stats = dm.stats()
    return Served(
        budget_ms=stats.budget_ms,
        level=sum(levels) / len(levels),
        skip_rate=stats.skip_rate,
        accuracy=right / len(levels),
        p50_ms=stats.latency_ms.p50,
        p95_ms=stats.latency_ms.p95,
        misses=None if stats.budget_ms is None else stats.budget_misses / stats.inferences,
        against={},
    )


def budgets_ms(sweep: list[Served]) -> tuple[float, float, float]:
    """Returns a loose, a middling and a tight budget for this machine, in milliseconds, from what levels 0 and 0.5 took."""
    dense_ms, half_ms = sweep[0].p50_ms, sweep[len(sweep) // 2].p50_ms
    return 1.5 * dense_ms, (dense_ms + half_ms) / 2, 1.1 * half_ms


def compare(dm: DynamicModel, digits: Digits, rivals: list[Rival], seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the rivals' median times in milliseconds, and each as a multiple of `dm`'s, measured in turns, one image a call."""
    import torch

    from dynprune.timing import measure_interleaved

    images = itertools.cycle(digits.test_images.split(1))
    functions = {"dynprune": lambda: dm(next(images))} | {rival.name: rival.run for rival in rivals if rival.run}
    with torch.inference_mode():
        times = measure_interleaved(functions, seconds=seconds)
    ours = times.pop("dynprune").median_ms
    return {name: taken.median_ms for name, taken in times.items()}, {name: taken.median_ms / ours for name, taken in times.items()}


def accuracy(logits: object, labels: object) -> float:
    """Returns the share of rows of `logits` (N, classes) whose largest value is at the label (N,)."""
    return (logits.argmax(1) == labels).float().mean().item()


def results_text(results: Results) -> str:
    """Returns the tables that the demo prints."""
    rivals = list(results.dense_ms)
    sweep = [[f"{row.level:.2f}", f"{row.skip_rate:.1%}", f"{row.accuracy:.1%}", row.p50_ms, row.p95_ms] for row in results.sweep]
    budgets = [
        [
            f"{row.budget_ms:.2f} ms",
            f"{row.level:.2f}",
            f"{row.skip_rate:.1%}",
            f"{row.accuracy:.1%}",
            row.p50_ms,
            row.p95_ms,
            f"{row.misses:.1%}",
            *(f"{row.against[name]:.2f}x" for name in rivals),
        ]
        for row in results.budgets
    ]
    dense = [f"{name} {ms:.2f} ms" for name, ms in results.dense_ms.items()] + [
        f"{name}: {why}" for name, why in results.unavailable.items()
    ]
    lines = [
        str(results.machine),
        f"{results.train_images} digits to train on, {results.test_images} to test, classified one at a time",
        f"the whole network: accuracy {results.dense_accuracy:.1%}; {'; '.join(dense)}",
        "",
        format_table(["level", "skip rate", "accuracy", "p50 ms", "p95 ms"], sweep),
        "",
        format_table(
            ["budget", "mean level", "skip rate", "accuracy", "p50 ms", "p95 ms", "misses", *(f"vs {name}" for name in rivals)], budgets
        ),
        "",
        "vs: the rival's median time for the whole network / ours, measured in turns; above 1x, ours is faster.",
        *results.notes,
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def progress_bars() -> Iterator[Stage]:
    """Gives a function that opens a named progress bar on stderr; off a terminal it prints a line for each stage."""
    import sys
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        @contextlib.contextmanager
        def stage(name: str) -> Iterator[Callable[[float], None]]:
            began_s = time.monotonic()
            task = progress.add_task(f"{name:<38}", total=1.0)
            yield lambda share: progress.update(task, completed=share)
            progress.update(task, completed=1.0)
            if not console.is_terminal:
                print(f"{name:<38} {time.monotonic() - began_s:6.1f} s", file=sys.stderr, flush=True)

        yield stage
