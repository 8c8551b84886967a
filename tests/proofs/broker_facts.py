"""What brokers really do, measured: `python -m tests.proofs.broker_facts [--only NAME]...` prints a table.

Each broker that is installed is started on loopback in a temporary folder, asked the same questions, and killed. The
answers are those of docs/brokers.md; they take about two minutes for all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from deploy.broker.make_site import CONFIG_TEMPLATE
from tests.brokers import Broker, NotInstalled, make_mosquitto, make_nats, make_rabbitmq

WINDOW = 20
"""Messages under way, as the agent has them."""

FIELD_BYTES, CELL_BYTES = 8_300, 450
"""A field of thirty cells, and one of its cells, as the agent sends them from the simulated slide."""

WAITING = 3000
"""Messages while the receiver is away."""

RATE_S = 3.0
"""How long each rate is measured."""

QUIET_S = 2.0
"""When nothing has come for so long, nothing more will."""


def site_lines() -> str:
    """The lines of make-site.sh's mosquitto.conf that are about keeping messages."""
    wanted = ("persistence", "autosave", "max_", "persistent", "set_tcp")
    return "\n".join(line for line in CONFIG_TEMPLATE.splitlines() if line.startswith(wanted)).replace(
        "{data}", "{folder}"
    )


BROKERS: dict[str, Callable[[Path], Broker]] = {
    "mosquitto, its defaults": make_mosquitto,
    "mosquitto, make-site.sh": lambda folder: make_mosquitto(folder, site_lines()),
    "nats-server, its defaults": make_nats,
    "RabbitMQ, its defaults": make_rabbitmq,
}


class Peer:
    """A bare client: counts what is acknowledged and what arrives; keeps a session unless it is told not to."""

    def __init__(self, broker: Broker, client_id: str, protocol: int, *, keeps: bool = True) -> None:
        self.arrived: list[mqtt.MQTTMessage] = []
        self.codes: list[int] = []
        self._window = threading.Semaphore(WINDOW)
        self._answered = threading.Condition()
        self._is_there = threading.Event()
        self._is_subscribed = threading.Event()
        is_v5 = protocol == mqtt.MQTTv5
        session: dict[str, Any] = {} if is_v5 else {"clean_session": not keeps}
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id, protocol=protocol, reconnect_on_failure=False, **session
        )
        self._client.max_inflight_messages_set(10_000)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._is_subscribed.set()
        self._client.on_publish = self._on_publish
        self._client.on_message = lambda _c, _u, message: self.arrived.append(message)
        self.refusal: str | None = None
        more: dict[str, Any] = {}
        if is_v5:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = 3600 if keeps else 0
            more = {"properties": properties, "clean_start": not keeps}
        self._client.connect(broker.host, broker.port, 60, **more)
        self._client.loop_start()
        if not self._is_there.wait(5):
            self.refusal = self.refusal or "hangs up without a word"

    def subscribe(self, topic: str) -> None:
        self._client.subscribe(topic, qos=1)
        assert self._is_subscribed.wait(10)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expiry_s: int | None = None) -> None:
        """Send with QoS 1, and wait when the window is full."""
        assert self._window.acquire(timeout=60), "the broker acknowledges nothing"
        properties = None
        if expiry_s is not None:
            properties = Properties(PacketTypes.PUBLISH)
            properties.MessageExpiryInterval = expiry_s
        self._client.publish(topic, payload, 1, retain, properties)

    def publish_all(self, topic: str, count: int) -> None:
        """So many messages, and wait for the last acknowledgement."""
        for number in range(count):
            self.publish(topic, b"%d" % number)
        with self._answered:
            assert self._answered.wait_for(lambda: len(self.codes) >= count, 60)

    def wait_quiet(self) -> list[mqtt.MQTTMessage]:
        """All that has arrived, when nothing has come for a while."""
        seen, since_s = -1, time.monotonic()
        while time.monotonic() - since_s < QUIET_S:
            if len(self.arrived) != seen:
                seen, since_s = len(self.arrived), time.monotonic()
            time.sleep(0.05)
        return self.arrived

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, _c: Any, _u: Any, _f: Any, code: Any, _p: Any) -> None:
        if code.is_failure:
            self.refusal = str(code)
        self._is_there.set()

    def _on_publish(self, _c: Any, _u: Any, _mid: int, code: Any, _p: Any) -> None:
        with self._answered:
            self.codes.append(code.value)
            self._answered.notify_all()
        self._window.release()


@dataclass(frozen=True)
class Bench:
    """A running broker and the best version that it speaks."""

    broker: Broker
    protocol: int

    @contextlib.contextmanager
    def peer(self, name: str, *, keeps: bool = True) -> Iterator[Peer]:
        one = Peer(self.broker, name, self.protocol, keeps=keeps)
        try:
            yield one
        finally:
            one.close()


# ------------------------------------------------------------------------------------------------- the questions


def speaks_5(broker: Broker) -> tuple[bool, str]:
    probe = Peer(broker, "probe", mqtt.MQTTv5, keeps=False)
    probe.close()
    return probe.refusal is None, "yes" if probe.refusal is None else f"no: {probe.refusal.lower()}"


def rate(bench: Bench, size: int) -> str:
    """Messages a second from one client, QoS 1, with one subscriber that takes them all."""
    with bench.peer("rate-ears", keeps=False) as ears, bench.peer("rate-voice", keeps=False) as voice:
        ears.subscribe("rate/#")
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < RATE_S:
            voice.publish("rate/x", bytes(size))
        return f"{len(voice.codes) / (time.monotonic() - begun_s):.0f}/s"


def says_when_nobody_listens(bench: Bench) -> str:
    with bench.peer("nobody", keeps=False) as voice:
        voice.publish_all("nobody/hears", 1)
        return "yes (code 16)" if voice.codes == [0x10] else "no"


def retained(bench: Bench) -> str:
    """Whether a late subscriber learns a retained message by its exact topic and by a wildcard."""
    with bench.peer("keeper", keeps=False) as voice:
        voice.publish("kept/a", b"x", retain=True)
        voice.publish_all("kept/none", 1)
    answers = []
    for pattern in ("kept/a", "kept/#"):
        with bench.peer("late", keeps=False) as late:
            late.subscribe(pattern)
            answers.append("yes" if any(message.retain for message in late.wait_quiet()) else "no")
    return f"{answers[0]} / {answers[1]}"


def expiry(bench: Bench) -> str:
    if bench.protocol != mqtt.MQTTv5:
        return "no (MQTT 5)"
    with bench.peer("keeper", keeps=False) as voice:
        voice.publish("expiring/a", b"x", retain=True, expiry_s=1)
        time.sleep(2.5)
    with bench.peer("late", keeps=False) as late:
        late.subscribe("expiring/a")
        return "no" if late.wait_quiet() else "yes"


def kept_for_absent(bench: Bench, between: Callable[[], None]) -> str:
    """How many of the acknowledged messages an absent receiver finds when it comes back, after `between`."""
    topic = f"absent/{time.monotonic_ns()}"
    with bench.peer("absent") as absent:
        absent.subscribe(f"{topic}/#")
    time.sleep(0.5)
    with bench.peer("voice", keeps=False) as voice:
        voice.publish_all(f"{topic}/x", WAITING)
    between()
    with bench.peer("absent") as absent:
        # A broker that was killed may also hand out what it had handed out before.
        ours = [message for message in absent.wait_quiet() if message.topic == f"{topic}/x"]
        numbers = [int(message.payload) for message in ours]
        absent._client.unsubscribe(f"{topic}/#")
        time.sleep(0.2)
    distinct = list(dict.fromkeys(numbers))
    order = "" if distinct == sorted(distinct) else ", not all in order"
    return f"{len(distinct)} of {WAITING}{order}"


def least_kept(bench: Bench, between: Callable[[], None]) -> str:
    """The worst of three: a broker that writes now and then is lucky once in a while."""
    return min((kept_for_absent(bench, between) for _ in range(3)), key=lambda words: int(words.split(" ")[0]))


def large(bench: Bench) -> str:
    """The largest of these sizes that is taken, and what happens with the next."""
    taken = "nothing"
    for size_mb in (0.5, 1, 3, 8, 64):
        with bench.peer("large", keeps=False) as voice:
            voice.publish("large/x", bytes(int(size_mb * 2**20)))
            with voice._answered:
                voice._answered.wait_for(lambda: bool(voice.codes) or not voice._client.is_connected(), 20)
            if not voice.codes:
                return f"{taken}; {size_mb:g} MB: hangs up"
            if voice.codes[0] >= 0x80:
                return f"{taken}; {size_mb:g} MB: refused with code {voice.codes[0]}"
        taken = f"{size_mb:g} MB"
    return f"{taken} and more"


def kill(bench: Bench) -> None:
    bench.broker.kill()
    bench.broker.start()


def ask(broker: Broker) -> dict[str, str]:
    """All questions to one broker, in the order of the table."""
    is_v5, words = speaks_5(broker)
    bench = Bench(broker, mqtt.MQTTv5 if is_v5 else mqtt.MQTTv311)
    answers = {"MQTT 5": words}
    questions: dict[str, Callable[[], str]] = {
        "QoS 1, cells of 450 bytes": lambda: rate(bench, CELL_BYTES),
        "QoS 1, fields of 8.3 kB": lambda: rate(bench, FIELD_BYTES),
        "says that nobody listens": lambda: says_when_nobody_listens(bench),
        "retained, by topic / by wildcard": lambda: retained(bench),
        "messages expire": lambda: expiry(bench),
        "largest message": lambda: large(bench),
        "receiver away": lambda: kept_for_absent(bench, lambda: None),
        "the same, broker restarted": lambda: kept_for_absent(bench, lambda: broker.restart() and None),
        "the same, broker `kill -9`": lambda: least_kept(bench, lambda: kill(bench)),
    }
    for question, answer in questions.items():
        answers[question] = answer()
    return answers


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.broker_facts", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="part of a broker's name; may be repeated")
    wanted = parser.parse_args(arguments).only
    table: dict[str, dict[str, str]] = {}
    for name, make in BROKERS.items():
        if wanted and not any(part.lower() in name.lower() for part in wanted):
            continue
        with tempfile.TemporaryDirectory(prefix="broker-facts-") as folder:
            try:
                broker = make(Path(folder) / "broker")
            except NotInstalled as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            try:
                table[name] = ask(broker.start())
            finally:
                broker.close()
            print(f"{name}: {table[name]}", file=sys.stderr)
    if not table:
        print("no broker was asked", file=sys.stderr)
        return 1
    print(f"| | {' | '.join(table)} |\n|---|{'---|' * len(table)}")
    for question in next(iter(table.values())):
        print(f"| {question} | {' | '.join(answers[question] for answers in table.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
