"""`hematovision collect` in a child process, and a device's way to the broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from agent.config import BrokerSection
from agent.delivery.link import BrokerLink, open_link
from tests.central.fake_device import Sent

ROOT = Path(__file__).resolve().parents[2]


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Look again and again until it is so."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


class CollectorProcess:
    """One collector that can be started, stopped, killed and frozen again and again, always with the same settings."""

    def __init__(self, folder: Path, url: str, port: int, name: str = "collector", **settings: Any) -> None:
        self.log_file = folder / f"{name}.log"
        self._settings_file = folder / f"{name}.yaml"
        broker = {"port": port, "max_backoff_s": 0.5, "keepalive_s": 2, **settings.pop("broker", {})}
        self._settings_file.write_text(yaml.safe_dump({"database": {"url": url}, "broker": broker, **settings}))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log_text(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def start(self) -> None:
        assert not self.is_running
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agent", "collect", "--config", str(self._settings_file)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def terminate(self) -> int:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(30)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)


class Wire:
    """A device's connection: sends with QoS 1 and waits for the PUBACKs."""

    def __init__(self, port: int, client_id: str = "hv-lab-scope") -> None:
        self.link: BrokerLink = open_link(BrokerSection(port=port), client_id=client_id, protocol="3.1.1", will=None)

    def send(self, messages: Sequence[Sent | tuple[str, bytes]], *, retain: bool = False) -> None:
        mids = set()
        for message in messages:
            topic, payload = message if isinstance(message, tuple) else (message.topic, message.payload)
            mids.add(self.link.publish(topic, payload, retain=retain))
        deadline_s = time.monotonic() + 15
        while mids:
            assert time.monotonic() < deadline_s, f"{len(mids)} messages without PUBACK"
            assert not self.link.is_closed, self.link.closed_reason
            mids -= {answer.mid for answer in self.link.turn(0.05)}

    def close(self) -> None:
        self.link.disconnect()
