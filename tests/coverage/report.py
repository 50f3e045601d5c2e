"""Counts the coverage list and writes docs/models.md: `python tests/coverage/report.py [--jobs N] [--resume FILE] [PATTERN ...]`.

A pattern is one of the name of an architecture, or the library it comes from; with patterns the results are only printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "models.md"
sys.path[:0] = [str(HERE), str(HERE.parent)]

from survey import ROUNDINGS, TOLERANCE, Coverage, survey  # noqa: E402

from zoo import ARCHITECTURES  # noqa: E402


def line_of(c: Coverage) -> str:
    if c.error:
        return f"{c.name}: does not wrap: {c.error}"
    ops = ", ".join(f"{name} {count}" for name, count in c.torch_ops.items())
    return (
        f"{c.name}: {c.macs / 1e6:.1f} MMAC, level 0 {c.level_0:.1e}, gated {c.gated:.1e}, {c.sites} sites, gateable {c.gateable:.0%}, "
        f"{c.torch_steps}/{c.steps} steps and {c.torch_macs:.1%} of MACs in PyTorch ({ops}), {c.seconds:.1f} s"
    )


def table_of(results: list[Coverage]) -> list[str]:
    lines = [
        "| architecture | from | million multiply-adds | sites | can be gated | steps | in PyTorch | equal |",
        "| --- | --- | --: | --: | --: | --: | --- | --- |",
    ]
    for c in results:
        ops = f"{c.torch_steps}: " + ", ".join(f"{name} {count}" for name, count in c.torch_ops.items()) if c.torch_steps else ""
        equal = f"no: {c.error}" if c.error else "yes" if c.is_equal else f"no: {max(c.level_0, c.gated):.1e}"
        name = f"{c.name} *" if c.held_out else c.name
        lines.append(f"| {name} | {c.source} | {c.macs / 1e6:.1f} | {c.sites} | {c.gateable:.0%} | {c.steps} | {ops} | {equal} |")
    return lines


def page_of(results: list[Coverage]) -> str:
    """Returns docs/models.md."""
    number = len(results)

    def share(count: int) -> str:
        return f"{count} of {number} ({count / number:.0%})"

    text = [
        "# Models",
        "",
        "Made by `python tests/coverage/report.py`; do not edit. Each architecture is built with random weights and small inputs, many",
        "with a small configuration too, wrapped, and run at batch 1 and 3. `tests/coverage/zoo.py` is the list.",
        "",
        f"- wraps: {share(sum(not c.error for c in results))}",
        "- equals the original at level 0, and engine equals hooked model at random active lists, both within",
        f"  {TOLERANCE:g} of the largest output, or as far from float64 as rounding takes the model (below): "
        + share(sum(c.is_equal for c in results)),
        f"- runs wholly on the engine: {share(sum(c.is_whole for c in results))}",
        f"- over half of its multiply-adds can be gated: {share(sum(c.gateable > 0.5 for c in results))}",
        "",
        "A multiply-add can be gated when it belongs to a layer of a gated channel space, attention head or branch, or reads one. What",
        "PyTorch runs is listed by operation; it runs on the same memory. Where a model fixes its batch size PyTorch runs all of it and",
        "nothing is gated. Models in bfloat16 and float16 run on the engine in float32, see [integrations.md](integrations.md).",
        "",
        "Architectures with * were added last, to see families that nobody had looked at. Three of the five were right at once. FocalNet",
        "showed gates that read a wrong dimension behind timm's LayerNorm2d; that was corrected.",
        "",
        "Some networks with random weights amplify rounding, so that two float32 results differ by more than the bound. They are judged by",
        "a float64 result at the same lists. Beside the engine's distance from it stands how far the float64 model itself moves when the",
        f"result of every module is rounded once to float32, at random up or down: the most of {ROUNDINGS} times. Equal is an engine",
        "that is at most twice as far, as a float32 result is rounded inside modules too. Of each model the worst of four cases:",
        *(
            [f"{c.name}: engine {c.from_exact:.1e}, rounding {c.rounding:.1e}." for c in results if max(c.level_0, c.gated) > TOLERANCE]
            or ["there are none among these."]
        ),
        "",
        *table_of(results),
    ]
    return "\n".join(text) + "\n"


def read_results(path: Path | None) -> dict[str, Coverage]:
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    return {result.name: result for result in (Coverage(**json.loads(line)) for line in lines)}


def survey_by_name(name: str) -> Coverage:
    architecture = next(one for one in ARCHITECTURES if one.name == name)
    try:
        return survey(architecture)
    except Exception as error:
        reason = f"in a call: {type(error).__name__}: {error}"
        return Coverage(architecture.name, architecture.source, architecture.held_out, error=reason)


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts the coverage list and writes docs/models.md.")
    parser.add_argument("patterns", nargs="*", help="names of architectures, or the library they come from; the page is then not written")
    parser.add_argument("--jobs", type=int, default=1, help="processes; default 1")
    parser.add_argument("--resume", type=Path, help="file of results, one JSON line each; what it holds is not run again")
    options = parser.parse_args()
    patterns = options.patterns
    chosen = [a for a in ARCHITECTURES if not patterns or any(fnmatch(a.name, p) or a.source == p for p in patterns)]
    known = read_results(options.resume)
    with get_context("spawn").Pool(options.jobs, maxtasksperchild=8) as pool:
        missing = [architecture.name for architecture in chosen if architecture.name not in known]
        for result in pool.imap(survey_by_name, missing):
            known[result.name] = result
            print("" if result.is_equal else "UNEQUAL ", line_of(result), sep="", flush=True)
            if options.resume is not None:
                with options.resume.open("a") as file:
                    file.write(json.dumps(result.as_dict()) + "\n")
    if not patterns:
        PAGE.write_text(page_of([known[architecture.name] for architecture in chosen]))


if __name__ == "__main__":
    main()
