"""A cluster of three brokers, a hundred devices, one node killed in the middle: is anything missing at the collectors?

    python -m tests.proofs.cluster [--devices 100] [--fields 100]

Three nats-servers with JetStream on this machine keep each message on two nodes before they acknowledge it. Each device
is the agent's own outbox and publisher, without camera and models; it appends fields like those of a real one. When a
third of all fields is collected one node, any of them, is killed with SIGKILL; when two thirds are, it comes back with
its disk. Devices and collectors find another node by the name of the cluster, which stands for all three addresses.

Prints the ledger of both ends and exits with 1 if anything that a device committed is missing at a collector.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt

from agent.config import BrokerSection
from agent.delivery.messages import Draft, rfc3339_ms
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.delivery.publisher import Publisher
from agent.delivery.topics import Topics
from agent.health import Health
from tests.brokers import Broker, NotInstalled, make_nats_cluster

CLUSTER_NAME = "cluster.test"
"""Stands for all nodes, as the laboratory's name server would say it."""

SITE = "lab"
COLLECTORS = 2
CELLS = 8

PATIENCE_S = 180.0
"""With nothing arriving for so long, the rest counts as missing."""


class Collector:
    """A receiver with a session of its own: keeps what it hears, then tells the device how far it has everything."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.heard: dict[str, Counter[int]] = {}
        self.last_at_s = time.monotonic()
        self.longest_silence_s = 0.0
        self.out_of_order = 0
        self._complete: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, f"collector-{name}", clean_session=False, protocol=mqtt.MQTTv311
        )
        self._client.reconnect_delay_set(0.2, 1)
        self._client.on_connect = lambda client, *_: client.subscribe(f"hv/1/{SITE}/+/field/+", qos=1)
        self._is_subscribed = threading.Event()
        self._client.on_subscribe = lambda *_: self._is_subscribed.set()
        self._client.on_message = self._on_message
        self._client.connect_async(CLUSTER_NAME, port, keepalive=5)
        self._client.loop_start()

    def wait_subscribed(self) -> None:
        assert self._is_subscribed.wait(60), f"collector {self.name}: the cluster does not take the subscription"

    def count(self) -> int:
        with self._lock:
            return sum(len(seqs) for seqs in self.heard.values())

    def repeats(self) -> int:
        with self._lock:
            return sum(count - 1 for seqs in self.heard.values() for count in seqs.values())

    def missing(self, device: str, fields: int) -> set[int]:
        with self._lock:
            return set(range(1, fields + 1)) - self.heard.get(device, Counter()).keys()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        body = json.loads(message.payload)
        device, seq = body["device"], body["seq"]
        with self._lock:
            now_s = time.monotonic()
            self.longest_silence_s = max(self.longest_silence_s, now_s - self.last_at_s)
            self.last_at_s = now_s
            seqs = self.heard.setdefault(device, Counter())
            if seq not in seqs and seqs and seq < max(seqs):
                self.out_of_order += 1
            seqs[seq] += 1
            while self._complete[device] + 1 in seqs:
                self._complete[device] += 1
            complete = self._complete[device]
        acknowledgement = {
            "schema": "hv/1/ack",
            "receiver": self.name,
            "device": device,
            "stream": "field",
            "boot": int(body["id"].split(":")[1]),
            "seq": complete,
            "at": rfc3339_ms(datetime.now(timezone.utc)),
            "ruo": True,
        }
        if complete and (complete % 10 == 0 or len(seqs) == complete):
            client.publish(f"hv/1/{SITE}/{device}/ack/{self.name}", json.dumps(acknowledgement), qos=1)


class Device:
    """The agent's outbox and publisher under one name."""

    def __init__(self, number: int, port: int, top: Path) -> None:
        self.name = f"scope-{number}"
        self._topics = Topics(SITE, self.name)
        self._folder = top / self.name
        boot = begin_boot(self._folder)
        self.outbox = self._open(verify=True)
        self.publisher = Publisher(
            topics=self._topics,
            broker=BrokerSection(host=CLUSTER_NAME, port=port, protocol="3.1.1", max_backoff_s=2, keepalive_s=5),
            boot=boot,
            open_outbox=lambda: self._open(verify=False),
            health=Health(),
        )

    def _open(self, *, verify: bool) -> Outbox:
        return open_outbox(self._folder, device=self.name, min_free_mb=0, verify=verify)

    def append(self, number: int) -> None:
        self.outbox.append([Draft("field", self._topics.field("s1"), field_body(self.name, number))])

    def close(self) -> None:
        self.publisher.stop(0)
        self.outbox.close()


def field_body(device: str, number: int) -> dict[str, Any]:
    """A field of a few cells, as large as a real one of that many."""
    model = {"name": "detector", "version": "0.1.0", "sha256": "a" * 64}
    names = ("neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil", "erythroblast", "platelet")
    cell = {
        "box": [100.0, 100.0, 172.5, 170.25],
        "detector": {"class": "WBC", "score": 0.91},
        "class": names[0],
        "probability": 0.9,
        "probabilities": dict.fromkeys(names, 0.1),
        "margin": 0.8,
        "status": "accepted",
    }
    return {
        "schema": "hv/1/field",
        "device": device,
        "site": SITE,
        "sample": "s1",
        "captured_at": rfc3339_ms(datetime.now(timezone.utc)),
        "captured_monotonic_ns": time.monotonic_ns(),
        "clock": {"synchronised": True, "offset_ms": None},
        "frame": {"n": number},
        "counts": {names[0]: CELLS},
        "unique_counts": {},
        "duplicates": 0,
        "cells": [{"cell_id": f"s1-{number * CELLS + n}", **cell} for n in range(CELLS)],
        "provenance": {"agent": "0.1.0", "detector": model, "classifier": model, "config_sha256": "b" * 64},
    }


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


@dataclass
class Report:
    """What came of it."""

    committed: int
    missing: dict[str, int]
    repeats: dict[str, int]
    out_of_order: dict[str, int]
    longest_silence_s: dict[str, float]
    left_in_outboxes: int
    took_s: float
    history: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not any(self.missing.values()) and self.left_in_outboxes == 0

    def __str__(self) -> str:
        lines = [
            *self.history,
            "",
            f"committed by the devices: {self.committed} fields in {self.took_s:.0f} s",
            f"left in the outboxes:     {self.left_in_outboxes}",
            "",
            "| collector | missing | repeats | came late | longest silence from the kill on |",
            "|---|---|---|---|---|",
        ]
        for name, missing in self.missing.items():
            lines.append(
                f"| {name} | {missing} | {self.repeats[name]} | {self.out_of_order[name]} "
                f"| {self.longest_silence_s[name]:.1f} s |"
            )
        return "\n".join(lines)


def run(top: Path, devices: int, fields: int, tell: Callable[[str], None] = print) -> Report:
    """The whole story; raises NotInstalled without nats-server."""
    nodes = make_nats_cluster(top / "cluster")
    begun_s = time.monotonic()
    history: list[str] = []

    def say(words: str) -> None:
        history.append(f"{time.monotonic() - begun_s:6.1f} s  {words}")
        tell(history[-1])

    with ExitStack() as cleanup:
        for node in nodes:
            cleanup.callback(node.close)
            node.start()
        cleanup.enter_context(named_cluster(nodes))
        say(f"{len(nodes)} nodes are up")
        collectors = [Collector(f"collector-{number}", nodes[0].port) for number in range(1, COLLECTORS + 1)]
        for collector in collectors:
            cleanup.callback(collector.close)
            collector.wait_subscribed()
        say(f"{len(collectors)} collectors are subscribed")
        fleet = [Device(number, nodes[0].port, top) for number in range(1, devices + 1)]
        for device in fleet:
            cleanup.callback(device.close)
            device.publisher.start()
        say(f"{devices} devices are started")

        committed = devices * fields
        appender = threading.Thread(target=append_all, args=(fleet, fields), name="appender")
        appender.start()
        cleanup.callback(appender.join)
        victim = random.choice(nodes)
        wait_collected(collectors[0], committed // 3)
        for collector in collectors:
            collector.longest_silence_s = 0.0
        victim.kill()
        say(f"{victim.folder.name} killed with SIGKILL; {collectors[0].count()} of {committed} fields are collected")
        wait_collected(collectors[0], 2 * committed // 3)
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
            repeats={collector.name: collector.repeats() for collector in collectors},
            out_of_order={collector.name: collector.out_of_order for collector in collectors},
            longest_silence_s={collector.name: collector.longest_silence_s for collector in collectors},
            left_in_outboxes=sum(device.outbox.depth() for device in fleet),
            took_s=time.monotonic() - begun_s,
            history=history,
        )


def append_all(fleet: Sequence[Device], fields: int) -> None:
    for number in range(1, fields + 1):
        for device in fleet:
            device.append(number)


def wait_collected(collector: Collector, count: int) -> None:
    """Until the collector has so many; a cluster that stands still is found by `wait_for_all`."""
    deadline_s = time.monotonic() + PATIENCE_S
    while collector.count() < count and time.monotonic() < deadline_s:
        time.sleep(0.02)


def wait_for_all(
    collectors: Sequence[Collector], fleet: Sequence[Device], committed: int, say: Callable[[str], None]
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
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="cluster-proof-") as folder:
        try:
            report = run(Path(folder), options.devices, options.fields)
        except NotInstalled as error:
            print(error, file=sys.stderr)
            return 2
    print(report)
    print("nothing is missing" if report.is_whole else "FIELDS ARE MISSING")
    return 0 if report.is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
