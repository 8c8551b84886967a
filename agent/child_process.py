"""A program that we start and that never outlives us.

The demo starts a broker and an agent. They run in a session of their own, so that Ctrl-C in the terminal reaches only
the demo, which then ends them in the right order; and the kernel kills them if the demo itself is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

# Runs in the child before the program takes its place. prctl(PR_SET_PDEATHSIG = 1, SIGKILL = 9) outlives execve; the
# parent may have died before it was set, hence the look at the parent's id. Not `preexec_fn`: that runs our code
# between fork and exec, which Python calls unsafe where threads exist.
_GUARD = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class ChildProcess:
    """One running program; what it writes goes to a log file. Use `stop` to end it."""

    def __init__(
        self,
        command: Sequence[str],
        log_file: Path,
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """command: a path and its arguments.   environment, folder: None = this process's."""
        self.name = Path(command[0]).name
        self._log_file = log_file
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _GUARD, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=None if environment is None else dict(environment),
                cwd=folder,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    @property
    def is_running(self) -> bool:
        return self.exit_code is None

    def last_lines(self, count: int = 5) -> str:
        """The end of what it wrote, for a message about its failure."""
        with self._log_file.open(encoding="utf-8", errors="replace") as log:
            return "".join(deque(log, maxlen=count)).strip()

    def stop(self, grace_s: float = 10.0) -> int:
        """Ask it to end (SIGTERM), kill it after `grace_s`; returns its exit code."""
        if self.is_running:
            self._process.terminate()
        try:
            return self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
