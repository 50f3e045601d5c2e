"""Finds this process's Linux control groups, of version 1, 2 or both at once, and reads what they allow.

Everything is read under a root directory, "/" in earnest and a made-up one in tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

_UNLIMITED_BYTES = 1 << 60
"""Version 1 writes a number near 2^63 for "no limit"."""


def cgroup_quota(root: str = "/") -> float | None:
    """Returns how many cores the CPU quota of the container allows, the tightest along the way up; None where no quota can be read."""
    try:
        version, directories = cgroup_directories(root.rstrip("/"), "cpu")
        return min((quota for directory in directories if (quota := quota_cores(version, directory)) is not None), default=None)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def cgroup_directories(root: str, controller: str, *, only_version: int | None = None) -> tuple[int, list[str]]:
    """Returns the version of the control groups that have `controller`, and this process's directory there, then those above it.

    On a hybrid machine a controller belongs to version 1 where it is mounted so. (0, []) where it is found nowhere.

    Args:
        root: directory that stands for "/".
        controller: such as "cpu" or "memory".
        only_version: 1 or 2 to look at one only; None for either.
    """
    try:
        groups = [line.split(":", 2) for line in read_text(f"{root}/proc/self/cgroup").splitlines()]
        mounts = list(_cgroup_mounts(root))
    except OSError:
        return 0, []
    for version in (1, 2) if only_version is None else (only_version,):
        own = next((path for _, names, path in groups if (controller in names.split(",") if version == 1 else not names)), None)
        mount = next((m for m in mounts if m[0] == version and (version == 2 or controller in m[3])), None)
        if own is None or mount is None:
            continue
        _, mount_root, mount_point, _ = mount
        top = f"{root}{mount_point}".rstrip("/")
        inside = own.removeprefix(mount_root.rstrip("/")).strip("/") if own.startswith(mount_root) else ""
        visible = inside and ".." not in inside and os.path.isdir(f"{top}/{inside}")
        parts = inside.split("/") if visible else []
        return version, ["/".join((top, *parts[:depth])) for depth in range(len(parts), -1, -1)]
    return 0, []


def quota_cores(version: int, directory: str) -> float | None:
    """Returns the CPU quota of one control group in cores; None for no quota."""
    try:
        if version == 1:
            quota, period = read_text(f"{directory}/cpu.cfs_quota_us"), read_text(f"{directory}/cpu.cfs_period_us")
        else:
            quota, period = read_text(f"{directory}/cpu.max").split()
    except FileNotFoundError:
        return None
    return None if quota.strip() in ("max", "-1") else int(quota) / int(period)


def limit_bytes(version: int, directory: str) -> int | None:
    """Returns the memory limit of one control group, for version 2 the lower of `memory.high` and `memory.max`; None for no limit."""
    limits = []
    for name in ("memory.limit_in_bytes",) if version == 1 else ("memory.high", "memory.max"):
        try:
            text = read_text(f"{directory}/{name}").strip()
        except FileNotFoundError:
            continue
        if text != "max" and int(text) < _UNLIMITED_BYTES:
            limits.append(int(text))
    return min(limits, default=None)


def read_text(path: str) -> str:
    """Returns the content of a file of the kernel, which is ASCII."""
    with open(path, "rb", buffering=0) as file:
        return file.read().decode("ascii")


def _cgroup_mounts(root: str) -> Iterator[tuple[int, str, str, list[str]]]:
    """Yields version, root within the hierarchy, mount point and options of every mounted control group hierarchy."""
    for line in read_text(f"{root}/proc/self/mountinfo").splitlines():
        place, _, kind = line.partition(" - ")
        filesystem, *_, options = kind.split()
        if filesystem in ("cgroup", "cgroup2"):
            mount_root, mount_point = place.split()[3:5]
            yield (1 if filesystem == "cgroup" else 2), mount_root, mount_point, options.split(",")
