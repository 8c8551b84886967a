"""A program that we start and that never outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from agent.child_process import ChildProcess

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]


def wait_until(is_so: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """A zombie counts as gone: in a container nobody may collect it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_it_ends_when_it_is_asked_and_tells_its_exit_code(tmp_path: Path):
    child = ChildProcess(SLEEPER, tmp_path / "log")
    wait_until(lambda: child.last_lines() == "up")
    assert child.is_running
    assert child.stop() == -signal.SIGTERM
    assert not child.is_running
    assert child.stop() == -signal.SIGTERM


def test_one_that_does_not_listen_is_killed(tmp_path: Path):
    child = ChildProcess(STUBBORN, tmp_path / "log")
    wait_until(lambda: child.last_lines() == "up")
    assert child.stop(grace_s=0.2) == -signal.SIGKILL


def test_the_end_of_what_it_wrote_is_kept_for_the_message(tmp_path: Path):
    child = ChildProcess(
        [sys.executable, "-c", "print(*range(9), sep='\\n'); raise SystemExit(4)"], tmp_path / "log", folder=tmp_path
    )
    wait_until(lambda: not child.is_running)
    assert child.exit_code == 4
    assert child.last_lines(3) == "6\n7\n8"


def test_its_environment_and_folder_are_the_given_ones(tmp_path: Path):
    child = ChildProcess(
        [sys.executable, "-c", "import os; print(os.getcwd(), os.environ.get('A'), os.environ.get('HOME'))"],
        tmp_path / "log",
        environment={"A": "b"},
        folder=tmp_path,
    )
    wait_until(lambda: not child.is_running)
    assert child.last_lines() == f"{tmp_path} b None"


def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path):
    parent_code = (
        "import sys, time; from pathlib import Path; from agent.child_process import ChildProcess\n"
        f"child = ChildProcess({SLEEPER!r}, Path({str(tmp_path / 'log')!r}))\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    top = Path(__file__).resolve().parent.parent
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True, cwd=top)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    wait_until(lambda: (tmp_path / "log").read_text() == "up\n")
    assert not is_gone(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: is_gone(pid))
