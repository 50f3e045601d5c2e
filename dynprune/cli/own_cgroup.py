"""A control group of our own with a CPU quota or a memory limit, where this user may make one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dynprune.control.cgroup import cgroup_directories
from dynprune.errors import DynpruneError

_PERIOD_US = 100_000


class NoCgroupError(DynpruneError):
    """This process may not make a control group; the message says why."""


class OwnCgroup:
    """Moves this process (and those it starts later) into a new control group for the time of the context.

    Args:
        controller: "cpu" or "memory".

    Raises:
        NoCgroupError: not permitted here, or no such controller.
    """

    def __init__(self, controller: str) -> None:
        self.version, directories = cgroup_directories("", controller)
        if not directories:
            raise NoCgroupError(f"no control group with {controller!r} is mounted here")
        self._parent = Path(directories[0])
        self.path = self._parent / f"dynprune-{os.getpid()}"

    def __enter__(self) -> OwnCgroup:
        try:
            self.path.mkdir()
            self._move(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            raise NoCgroupError(f"a control group under {self._parent} cannot be made: {error.strerror}") from error
        return self

    def __exit__(self, *exception: object) -> None:
        self._move(self._parent)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def set_cpu_quota(self, cores: float | None) -> None:
        """Limits the group to so many cores; None ends the limit."""
        quota = None if cores is None else round(cores * _PERIOD_US)
        if self.version == 1:
            self._write("cpu.cfs_quota_us", -1 if quota is None else quota)
        else:
            self._write("cpu.max", f"{'max' if quota is None else quota} {_PERIOD_US}")

    def set_memory_limit(self, size: int | None) -> None:
        """Limits the group to `size` bytes; None ends the limit."""
        name, unlimited = ("memory.limit_in_bytes", -1) if self.version == 1 else ("memory.max", "max")
        self._write(name, unlimited if size is None else size)

    def _write(self, name: str, value: object) -> None:
        try:
            (self.path / name).write_text(str(value))
        except OSError as error:
            raise NoCgroupError(f"{name} of {self.path} cannot be set: {error.strerror}") from error

    def _move(self, group: Path) -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
