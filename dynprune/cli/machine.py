"""What a measurement depends on besides the code: CPU, instruction set, threads, versions."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from dynprune import __version__
from dynprune.control.host import cpu_name


@dataclass(frozen=True)
class Machine:
    """The conditions of a measurement; every report begins with them."""

    cpu: str
    isa: str
    threads: int
    torch: str
    dynprune: str
    commit: str

    def to_dict(self) -> dict[str, object]:
        """Returns the fields by name, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"CPU {self.cpu} | ISA {self.isa} | threads {self.threads} | torch {self.torch} | "
            f"dynprune {self.dynprune} | commit {self.commit}"
        )


def describe_machine(threads: int) -> Machine:
    """Returns the machine this process runs on; `threads` is what the measurement uses."""
    import torch

    from dynprune.runtime.engine import choose_isa

    return Machine(cpu_name(), choose_isa(), threads, torch.__version__, __version__, commit())


def commit() -> str:
    """Returns the short hash of the checkout the package lies in, "+" after it where files are changed; "none" outside git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "none"
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=9"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return described.stdout.strip() or "none"
