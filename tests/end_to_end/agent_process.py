"""`hematovision run` in a child process, with a configuration and an outbox of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.delivery.outbox import open_outbox
from agent.errors import OutboxError

ROOT = Path(__file__).resolve().parents[2]

START_S = 60.0
"""s; for anything that the agent does on a slow machine with other work."""


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Look again and again until it is so."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


class Agent:
    """`hematovision run` in a child process; its log is in `log_text`."""

    def __init__(self, config_file: Path, log_file: Path, environment: dict[str, str]) -> None:
        self.log_file = log_file
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agent", "run", "--config", str(config_file)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def log_text(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait(self, timeout_s: float = START_S) -> int:
        """The exit code, when it has ended by itself."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the agent has not ended in {timeout_s} s:\n{self.log_text}") from None

    def terminate(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Bench:
    """One place of work: a configuration that is changed by key, an outbox, and as many agents as a test starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outbox_folder = folder / "outbox"
        self.config: dict[str, Any] = {
            "site": "lab",
            "device": "scope",
            "outbox": {"folder": str(self.outbox_folder), "min_free_mb": 0},
            "publish": {"health_interval_s": 1},
            "models": {"threads": 1},
        }
        self._agents: list[Agent] = []

    def use_broker(self, port: int, **keys: Any) -> None:
        self.config["broker"] = {"port": port, "max_backoff_s": 0.5, **keys}

    def use_folder(self, path: Path, **keys: Any) -> None:
        self.config["camera"] = {"kind": "folder", "folder": {"path": str(path), **keys}}

    def start(self, **environment: str) -> Agent:
        config_file = self.folder / "config.yaml"
        config_file.write_text(yaml.safe_dump(self.config))
        agent = Agent(config_file, self.folder / f"agent-{len(self._agents)}.log", environment)
        self._agents.append(agent)
        return agent

    def waiting(self) -> Counter[str]:
        """How many rows of each stream are in the outbox now."""
        try:
            with open_outbox(self.outbox_folder, verify=False, create=False) as outbox:
                return Counter(row.stream for row in outbox.pending(0, 1_000_000))
        except OutboxError:  # not there yet, or just being set up
            return Counter()

    def finished(self) -> int:
        """How many pictures of the folder are done with."""
        try:
            with open_outbox(self.outbox_folder, verify=False, create=False) as outbox:
                return len(outbox.finished_keys())
        except OutboxError:  # not there yet, or just being set up
            return 0

    def close(self) -> None:
        for agent in self._agents:
            if agent.is_running:
                agent.kill()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A `Bench`; every agent that it started is gone when the test ends."""
    made = Bench(tmp_path)
    yield made
    made.close()
