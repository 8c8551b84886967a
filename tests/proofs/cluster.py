"""A cluster of three brokers, a hundred devices, one node killed in the middle: is anything missing at the collectors?

    python -m tests.proofs.cluster [--devices 100] [--fields 100] [--confirm receiver|broker]

Three nats-servers with JetStream on this machine keep each message on two nodes before they acknowledge it. Each device
is the agent's own outbox and publisher, without camera and models; the collectors are those of `hematovision collect`.
When a third of all fields is collected one node, any of them, is killed with SIGKILL; when two thirds are, it comes
back with its disk. Devices and collectors find another node by the name of the cluster, which stands for all addresses.

With `--confirm receiver`, the default, a field leaves its device at the word of both collectors, else at the broker's.
Prints the ledger of both ends and exits with 1 if anything that a device committed is missing at a collector.
"""

from __future__ import annotations

import argparse
import logging
import random
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.central.collector import Collector
from agent.central.database import open_database
from agent.central.settings import CollectorConfig
from agent.config import BrokerSection, DeliverySection
from agent.delivery.link import BrokerLink, open_link
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.delivery.publisher import Publisher
from agent.errors import BrokerUnavailable
from agent.health import Health
from tests.brokers import Broker, NotInstalled, make_nats_cluster
from tests.central.fake_device import FakeDevice

CLUSTER_NAME = "cluster.test"
"""Stands for all nodes, as the laboratory's name server would say it."""

SITE = "lab"
COLLECTORS = 2
CELLS = 8

RESEND_S = 30.0
"""What no collector has confirmed for this long is sent again."""

PATIENCE_S = 180.0
"""With nothing arriving for so long, the rest counts as missing."""


class Receiver:
    """`hematovision collect` on a thread of its own, with its own session and its own SQLite file."""

    is_set = False
    """What the collector looks at to know that it is to stop."""

    def __init__(self, name: str, port: int, folder: Path) -> None:
        self.name = name
        self.file = folder / f"{name}.db"
        self.silences = Silences()
        url = f"sqlite:///{self.file}"
        settings = CollectorConfig.model_validate(
            {
                "receiver": name,
                "database": {"url": url},
                "broker": {
                    "host": CLUSTER_NAME,
                    "port": port,
                    "protocol": "3.1.1",
                    "max_backoff_s": 1,
                    "keepalive_s": 5,
                },
            }
        )
        self.collector = Collector(settings, open_database(url), self)
        self._thread = threading.Thread(target=self.collector.run, name=name)

    def wait(self, timeout_s: float) -> bool:
        """Part of how it is stopped; it need not be fast."""
        time.sleep(min(timeout_s, 0.2))
        return self.is_set

    def start(self) -> None:
        """Start it, and wait until it has its tables; its session at the broker comes a moment later."""
        self._thread.start()
        wait_until(lambda: self._ask("SELECT COUNT(*) FROM fields") is not None, f"{self.name} has its tables")

    def count(self) -> int:
        (found,) = self._ask("SELECT COUNT(*) FROM fields") or [(0,)]
        self.silences.note(found[0])
        return int(found[0])

    def missing(self, device: str, fields: int) -> set[int]:
        found = self._ask("SELECT seq FROM fields WHERE device = ?", device)
        assert found is not None
        return set(range(1, fields + 1)) - {seq for (seq,) in found}

    def dead_letters(self) -> int:
        (found,) = self._ask("SELECT COUNT(*) FROM dead_letters") or [(0,)]
        return int(found[0])

    def close(self) -> None:
        self.is_set = True
        self._thread.join(30)

    def _ask(self, query: str, *values: str) -> list[tuple[Any, ...]] | None:
        """None while the tables are not there yet."""
        if not self.file.exists():
            return None
        with closing(sqlite3.connect(f"file:{self.file}?mode=ro", uri=True, timeout=10)) as connection:
            try:
                return connection.execute(query, values).fetchall()
            except sqlite3.OperationalError:
                return None


class Silences:
    """The longest time in which a count stood still, from `begin` on."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._count = -1
        self._since_s = time.monotonic()

    def begin(self) -> None:
        self.longest_s, self._since_s = 0.0, time.monotonic()

    def note(self, count: int) -> None:
        if count != self._count:
            self.longest_s = max(self.longest_s, time.monotonic() - self._since_s)
            self._count, self._since_s = count, time.monotonic()


class Device:
    """The agent's outbox and publisher under one name."""

    def __init__(self, number: int, port: int, top: Path, delivery: DeliverySection) -> None:
        self.name = f"scope-{number}"
        self._folder = top / self.name
        boot = begin_boot(self._folder)
        self._fake = FakeDevice(self.name, SITE, sample="s1", boot=boot)
        self.outbox = self._open(verify=True)
        self.publisher = Publisher(
            topics=self._fake.topics,
            broker=BrokerSection(host=CLUSTER_NAME, port=port, protocol="3.1.1", max_backoff_s=2, keepalive_s=5),
            boot=boot,
            open_outbox=lambda: self._open(verify=False),
            health=Health(),
            delivery=delivery,
        )

    def _open(self, *, verify: bool) -> Outbox:
        return open_outbox(self._folder, device=self.name, min_free_mb=0, verify=verify)

    def append(self) -> None:
        self.outbox.append([self._fake.field_draft(CELLS)])

    def close(self) -> None:
        self.publisher.stop(0)
        self.outbox.close()


@contextmanager
def named_cluster(nodes: Sequence[Broker]) -> Iterator[None]:
    """While inside, the name of the cluster stands for the addresses of all nodes, in a new order each time."""
    before = socket.getaddrinfo

    def find(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host != CLUSTER_NAME:
            return before(host, port, *arguments, **options)
        addresses = [node.host for node in nodes]
        random.shuffle(addresses)
        return [found for address in addresses for found in before(address, port, *arguments, **options)]

    socket.getaddrinfo = find
    try:
        yield
    finally:
        socket.getaddrinfo = before


@dataclass(frozen=True)
class Report:
    """What came of it. By receiver: fields that are missing, messages it could not store, longest time without any."""

    committed: int
    missing: dict[str, int]
    dead_letters: dict[str, int]
    longest_silence_s: dict[str, float]
    left_in_outboxes: int
    took_s: float

    @property
    def is_whole(self) -> bool:
        return not any(self.missing.values()) and not any(self.dead_letters.values()) and self.left_in_outboxes == 0

    def __str__(self) -> str:
        lines = [
            f"committed by the devices: {self.committed} fields in {self.took_s:.0f} s",
            f"left in the outboxes:     {self.left_in_outboxes}",
            "",
            "| collector | missing | not storable | longest silence from the kill on |",
            "|---|---|---|---|",
        ]
        for name, missing in self.missing.items():
            silence_s = self.longest_silence_s[name]
            lines.append(f"| {name} | {missing} | {self.dead_letters[name]} | {silence_s:.1f} s |")
        return "\n".join(lines)


def run(
    top: Path, devices: int, fields: int, confirm: Literal["broker", "receiver"], tell: Callable[[str], None] = print
) -> Report:
    """The whole story; raises NotInstalled without nats-server."""
    nodes = make_nats_cluster(top / "cluster")
    begun_s = time.monotonic()

    def say(words: str) -> None:
        tell(f"{time.monotonic() - begun_s:6.1f} s  {words}")

    with ExitStack() as cleanup:
        for node in nodes:
            cleanup.callback(node.close)
            node.start()
        cleanup.enter_context(named_cluster(nodes))
        say(f"{len(nodes)} nodes are up")
        collectors = [Receiver(f"collector-{number}", nodes[0].port, top) for number in range(1, COLLECTORS + 1)]
        for collector in collectors:
            cleanup.callback(collector.close)
            collector.start()
        wait_for_sessions(collectors, nodes[0].port)
        say(f"{len(collectors)} collectors are subscribed")
        names = ", ".join(collector.name for collector in collectors)
        delivery = DeliverySection(confirm=confirm, receiver=names, resend_s=RESEND_S)
        fleet = [Device(number, nodes[0].port, top, delivery) for number in range(1, devices + 1)]
        for device in fleet:
            cleanup.callback(device.close)
            device.publisher.start()
        say(f"{devices} devices are started")

        committed = devices * fields
        appender = threading.Thread(target=append_all, args=(fleet, fields), name="appender")
        appender.start()
        cleanup.callback(appender.join)
        victim = random.choice(nodes)
        wait_collected(collectors, committed // 3)
        for collector in collectors:
            collector.silences.begin()
        victim.kill()
        say(f"{victim.folder.name} killed with SIGKILL; {collectors[0].count()} of {committed} fields are collected")
        wait_collected(collectors, 2 * committed // 3)
        victim.start()
        say(f"{victim.folder.name} is back; {collectors[0].count()} fields are collected")
        appender.join()
        say(f"all {committed} fields are committed by the devices")
        wait_for_all(collectors, fleet, committed, say)
        return Report(
            committed=committed,
            missing={
                collector.name: sum(len(collector.missing(device.name, fields)) for device in fleet)
                for collector in collectors
            },
            dead_letters={collector.name: collector.dead_letters() for collector in collectors},
            longest_silence_s={collector.name: collector.silences.longest_s for collector in collectors},
            left_in_outboxes=sum(device.outbox.depth() for device in fleet),
            took_s=time.monotonic() - begun_s,
        )


def wait_for_sessions(collectors: Sequence[Receiver], port: int) -> None:
    """Until a probe that is published now is stored by all of them: what comes before has no receiver yet."""
    fake = FakeDevice("probe", SITE)
    topic, payload = fake.state()

    def are_there() -> bool:
        try:
            with closing_link(port) as link:
                link.publish(topic, payload, retain=True)
                link.turn(0.5)
        except BrokerUnavailable:  # the nodes have not found each other yet
            return False
        return all(collector._ask("SELECT device FROM devices WHERE device = 'probe'") for collector in collectors)

    wait_until(are_there, "the collectors are subscribed")


@contextmanager
def closing_link(port: int) -> Iterator[BrokerLink]:
    section = BrokerSection(host=CLUSTER_NAME, port=port)
    link = open_link(section, client_id="probe", protocol="3.1.1", will=None)
    try:
        yield link
    finally:
        link.disconnect()


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.2)


def append_all(fleet: Sequence[Device], fields: int) -> None:
    for _ in range(fields):
        for device in fleet:
            device.append()


def wait_collected(collectors: Sequence[Receiver], count: int) -> None:
    """Until all of them have so many; a cluster that stands still is found by `wait_for_all`."""
    deadline_s = time.monotonic() + PATIENCE_S
    while min(collector.count() for collector in collectors) < count and time.monotonic() < deadline_s:
        time.sleep(0.1)


def wait_for_all(
    collectors: Sequence[Receiver], fleet: Sequence[Device], committed: int, say: Callable[[str], None]
) -> None:
    """Until everything is there, or nothing moves any more."""
    seen: tuple[int, ...] = ()
    moved_at_s = told_at_s = time.monotonic()
    while time.monotonic() - moved_at_s < PATIENCE_S:
        left = sum(device.outbox.depth() for device in fleet)
        now = (*(collector.count() for collector in collectors), left)
        if now != seen:
            seen, moved_at_s = now, time.monotonic()
        if now == (*(committed for _ in collectors), 0):
            say("everything is collected and every outbox is empty")
            return
        if time.monotonic() - told_at_s > 10:
            told_at_s = time.monotonic()
            say(f"collected {now[:-1]}, {left} left in the outboxes")
        time.sleep(0.2)
    say("nothing has moved for too long")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.cluster", description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--fields", type=int, default=100, help="for each device (default: %(default)s)")
    parser.add_argument(
        "--confirm", choices=("receiver", "broker"), default="receiver", help="at whose word they leave"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="cluster-proof-") as folder:
        try:
            report = run(Path(folder), options.devices, options.fields, options.confirm)
        except NotInstalled as error:
            print(error, file=sys.stderr)
            return 2
    print(report)
    print("nothing is missing" if report.is_whole else "FIELDS ARE MISSING")
    return 0 if report.is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
