"""`dynprune doctor`: prints what this machine offers, what dynprune would choose on it, and why things may be slow."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from dynprune.cli.table import format_table

_SWAP_IN_USE = 0.05
_BUSY_FRACTION = 0.25
_LITTLE_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Facts:
    """What the advice is given on; None where this machine does not tell.

    Attributes:
        cores: that the operating system lets this process use.
        quota: cores that the container's CPU quota allows, at most `cores`.
        threads: of torch, and so of the engine by default.
        isa: the instruction set chosen.
        available_isas: those this machine runs, slowest first.
        max_isa: DYNPRUNE_MAX_ISA, "" where it is not set.
        load_average: runnable tasks over the last minute.
        cpu_fraction: busy share of all cores just now.
        throttled_fraction: share of the time the container was throttled by its quota.
        governors: of the cores' clocks, each once.
        swap_fraction: used share of the swap space.
        memory_available_bytes: that can be had without swapping.
        on_battery: whether the machine runs from its battery.
    """

    cores: int
    quota: float
    threads: int
    isa: str
    available_isas: tuple[str, ...]
    max_isa: str = ""
    load_average: float | None = None
    cpu_fraction: float | None = None
    throttled_fraction: float | None = None
    governors: tuple[str, ...] = ()
    swap_fraction: float | None = None
    memory_available_bytes: int | None = None
    on_battery: bool | None = None


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the verb `doctor`."""
    parser = verbs.add_parser("doctor", help="print what this machine offers, what is chosen on it, and why things may be slow")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings; returns 0."""
    import time

    import torch

    from dynprune.cli.machine import describe_machine
    from dynprune.control.monitor import ResourceMonitor
    from dynprune.control.sources import cpu_quota
    from dynprune.runtime import _C

    machine = describe_machine(torch.get_num_threads())
    with ResourceMonitor(interval_s=0.1) as monitor:
        time.sleep(0.5)
        sample = monitor.sample()
        sources = monitor.sources()
    facts = Facts(
        cores=available_cores(),
        quota=cpu_quota(),
        threads=torch.get_num_threads(),
        isa=machine.isa,
        available_isas=tuple(_C.available_isas()),
        max_isa=os.environ.get("DYNPRUNE_MAX_ISA", ""),
        load_average=sample.load_average,
        cpu_fraction=sample.cpu_fraction,
        throttled_fraction=sample.throttled_fraction,
        governors=clock_governors(),
        swap_fraction=sample.swap_fraction,
        memory_available_bytes=sample.memory_available_bytes,
        on_battery=sample.on_battery,
    )
    features = _C.cpu_features()
    print(f"dynprune {machine.dynprune}, commit {machine.commit}, torch {machine.torch}")
    print(f"CPU           {machine.cpu}")
    print(f"features      {' '.join(sorted(name for name, has in features.items() if has)) or 'none of those asked for'}")
    print(f"  missing     {' '.join(sorted(name for name, has in features.items() if not has)) or 'none of those asked for'}")
    print(f"kernels       {facts.isa}, of {', '.join(facts.available_isas)} (DYNPRUNE_MAX_ISA {facts.max_isa or 'not set'})")
    print(f"cores         {facts.cores} usable, quota {facts.quota:g}")
    print(f"threads       {facts.threads} (torch, and the engine unless set_num_threads says otherwise)")
    print(f"governor      {', '.join(facts.governors) or 'not visible here'}")
    print()
    rows = [[state.name, "yes" if state.available else "no", state.detail] for state in sources]
    print(format_table(["monitor source", "available", "detail"], rows, text_columns=3))
    print()
    found = advice(facts)
    print("Why things may be slow here:" if found else "Nothing found that would slow things down here.")
    for line in found:
        print(f"- {line}")
    return 0


def available_cores() -> int:
    """Returns how many cores the operating system lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clock_governors(root: Path = Path("/sys/devices/system/cpu")) -> tuple[str, ...]:
    """Returns the names of the governors that set the cores' clocks, each once; empty where the system does not tell."""
    names = set()
    for path in root.glob("cpu[0-9]*/cpufreq/scaling_governor"):
        try:
            names.add(path.read_text().strip())
        except OSError:
            continue
    return tuple(sorted(names))


def advice(facts: Facts) -> list[str]:
    """Returns one sentence or two for each thing that makes inference slow or its time uneven here, with what to do about it."""
    usable = min(facts.cores, facts.quota)
    found = []
    if facts.isa != facts.available_isas[-1]:
        found.append(f"DYNPRUNE_MAX_ISA={facts.max_isa} holds the kernels at {facts.isa}, {facts.available_isas[-1]} would run; unset it.")
    elif facts.isa == "scalar":
        found.append("This CPU has no vector instructions that dynprune has kernels for (AVX2 or AVX-512); it runs the plain ones.")
    if facts.quota < facts.cores:
        found.append(
            f"The container may use {facts.quota:g} of {facts.cores} cores; more busy threads than that are throttled in bursts. "
            "Raise the quota, or lower the threads to it."
        )
    if facts.threads > usable:
        found.append(f"{facts.threads} threads share {usable:g} cores; call torch.set_num_threads({max(1, int(usable))}).")
    if facts.throttled_fraction:
        found.append(
            f"The container was throttled {facts.throttled_fraction:.0%} of the time just now; raise its quota or use fewer threads."
        )
    if facts.load_average is not None and facts.load_average > facts.cores:
        found.append(f"The load average is {facts.load_average:.1f} on {facts.cores} cores: other programs take part of each core.")
    elif facts.cpu_fraction is not None and facts.cpu_fraction > _BUSY_FRACTION:
        found.append(f"The CPU is {facts.cpu_fraction:.0%} busy just now; timings taken now are not those of an idle machine.")
    if "powersave" in facts.governors:
        found.append("The clock governor 'powersave' may hold the clock low; where you may, run: cpupower frequency-set -g performance.")
    if facts.swap_fraction is not None and facts.swap_fraction > _SWAP_IN_USE:
        found.append(f"{facts.swap_fraction:.0%} of the swap space is in use; a model that was swapped out is slow to wake.")
    if facts.memory_available_bytes is not None and facts.memory_available_bytes < _LITTLE_MEMORY_BYTES:
        found.append(f"Only {facts.memory_available_bytes / 2**20:.0f} MiB of memory can be had without swapping.")
    if facts.on_battery:
        found.append("The machine runs from its battery, which often lowers the clock.")
    return found
