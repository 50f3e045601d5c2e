"""Other programs that take CPU time or memory, on command: what a budget is kept against."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

_DIE_WITH_PARENT = """
import ctypes, os, sys
os.setpgrp()
try:
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: not left running where this process is killed
except (AttributeError, OSError, TypeError):
    pass
"""
_BUSY = _DIE_WITH_PARENT + "while True: pass"
_TOOL = _DIE_WITH_PARENT + "os.execv(sys.argv[1], sys.argv[1:])"
_HOLD = "import sys; held = bytearray(int(sys.argv[1])); held[::4096] = b'x' * len(held[::4096]); print(flush=True); sys.stdin.read()"
_START_S = 0.05


class BusyNeighbours:
    """Processes of one thread that never sleeps: stress-ng's where it is installed, else Python's. None runs until `set` says so.

    They are made once and stopped and continued by signals, so that a change of their number takes effect at once. They stay in this
    process's session, where each has the weight of one thread of ours; one in a session of its own has the weight of all our threads
    together where the kernel groups tasks by session.

    Args:
        most: how many there can be.
    """

    def __init__(self, most: int) -> None:
        tool = shutil.which("stress-ng")
        self.kind = "stress-ng" if tool else "python"
        command = [sys.executable, "-c", *([_TOOL, tool, "--cpu", "1", "--quiet"] if tool else [_BUSY])]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._processes = [subprocess.Popen(command, **quiet) for _ in range(most)]
        while any(process.poll() is None and os.getpgid(process.pid) != process.pid for process in self._processes):
            time.sleep(_START_S)
        self.running = most
        self.set(0)

    def set(self, running: int) -> None:
        """Lets so many of them run and stops the others."""
        for number, process in enumerate(self._processes):
            if (number < running) != (number < self.running):
                os.killpg(process.pid, signal.SIGCONT if number < running else signal.SIGSTOP)
        self.running = running

    def __enter__(self) -> BusyNeighbours:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def held_memory(size: int) -> Iterator[None]:
    """A process that holds `size` bytes of memory for the time of the context."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()
