"""Counts the coverage list and writes docs/models.md: `python tests/coverage/report.py [PATTERN ...]`; with patterns it only prints.

A pattern is one of the name of an architecture, or the library it comes from.
"""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "models.md"
sys.path[:0] = [str(HERE), str(HERE.parent)]

from survey import Coverage, survey  # noqa: E402
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
        lines.append(
            f"| {c.name}{' *' if c.held_out else ''} | {c.source} | {c.macs / 1e6:.1f} | {c.sites} | {c.gateable:.0%} | {c.steps} | {ops} | {equal} |"
        )
    return lines


def page_of(results: list[Coverage]) -> str:
    """Returns docs/models.md."""
    number = len(results)

    def share(count: int) -> str:
        return f"{count} of {number} ({count / number:.0%})"

    text = [
        "# Models",
        "",
        "Made by `python tests/coverage/report.py`; do not edit. Each architecture is built with random weights and small inputs (many also",
        "with a small configuration), wrapped, and run at batch 1 and 3. `tests/coverage/zoo.py` is the list.",
        "",
        f"- wraps: {share(sum(not c.error for c in results))}",
        f"- equals the original at level 0, and engine equals hooked model at random active lists, both within {TOLERANCE:g} of the largest",
        f"  output: {share(sum(c.is_equal for c in results))}",
        f"- runs wholly on the engine: {share(sum(c.is_whole for c in results))}",
        f"- over half of its multiply-adds can be gated: {share(sum(c.gateable > 0.5 for c in results))}",
        "",
        "A multiply-add can be gated when it belongs to a layer of a gated channel space, of a gated attention head or of a gated branch, or",
        "reads one. What PyTorch runs is listed by operation; it runs on the same memory. Where the batch size of a model is fixed, or its",
        "weights are not float32, PyTorch runs all of it and nothing is gated. Architectures with * were added last, and nothing was changed for",
        "them.",
        "",
        *table_of(results),
    ]
    return "\n".join(text) + "\n"


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
    if not patterns:
        PAGE.write_text(page_of(results))


if __name__ == "__main__":
    main()
