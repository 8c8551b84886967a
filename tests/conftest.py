"""Real parts for all tests: brokers in child processes on free loopback ports, a subscriber that keeps all it gets, and
an outbox.

`mosquitto` and `nats` are factories. Each call gives a broker that can be stopped, killed and started again on the same
port; all of them are gone when the test ends.

    def test_something(mosquitto, subscriber):
        broker = mosquitto("message_size_limit 4096")
        ears = subscriber(broker, "hv/1/#")
        ...
        broker.kill()
        broker.restart()
        ears.wait_for(lambda messages: len(messages) >= 3)
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from tests.brokers import Broker, NotInstalled, find_program, make_mosquitto, make_nats, make_rabbitmq
from tests.relay import Relay


@contextlib.contextmanager
def broker_factory(make: Callable[..., Broker], top: Path, name: str) -> Iterator[Callable[..., Broker]]:
    """A factory of brokers of one kind, `(..., start=True) -> Broker`; skips where the program is absent."""
    brokers: list[Broker] = []

    def make_one(*arguments: Any, start: bool = True, **options: Any) -> Broker:
        try:
            brokers.append(make(top / f"{name}-{len(brokers)}", *arguments, **options))
        except NotInstalled as error:
            pytest.skip(str(error))
        return brokers[-1].start() if start else brokers[-1]

    try:
        yield make_one
    finally:
        for broker in brokers:
            broker.close()


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """Factory `mosquitto(config="", *, start=True, listener=True) -> Broker`; see `tests.brokers.make_mosquitto`."""
    with broker_factory(make_mosquitto, tmp_path, "mosquitto") as factory:
        yield factory


@pytest.fixture
def mosquitto_password_file(tmp_path: Path) -> Callable[[str, str], Path]:
    """Factory `(user, password) -> Path` of a file for mosquitto's `password_file`."""

    def make(user: str, password: str) -> Path:
        try:
            program = find_program("mosquitto_passwd", "apt install mosquitto")
        except NotInstalled as error:
            pytest.skip(str(error))
        path = tmp_path / "mosquitto.passwords"
        subprocess.run([program, "-b", "-c", str(path), user, password], check=True, capture_output=True)
        return path

    return make


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """Factory `nats(mqtt="", *, start=True) -> Broker`: nats-server with MQTT (3.1.1 only)."""
    with broker_factory(make_nats, tmp_path, "nats") as factory:
        yield factory


@pytest.fixture
def rabbitmq(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """Factory `rabbitmq(start=True) -> Broker`: RabbitMQ with its MQTT plugin (3.1.1 only before version 3.13)."""
    with broker_factory(make_rabbitmq, tmp_path, "rabbitmq") as factory:
        yield factory


@pytest.fixture
def relay() -> Iterator[Callable[[Broker], Relay]]:
    """Factory `relay(broker) -> Relay`: connect to its host and port instead of the broker's."""
    relays: list[Relay] = []

    def make(broker: Broker) -> Relay:
        relays.append(Relay(broker.port))
        return relays[-1]

    yield make
    for one in relays:
        one.close()


@dataclass(frozen=True)
class Heard:
    """One message as a subscriber got it."""

    topic: str
    payload: bytes
    qos: int
    is_retained: bool
    properties: Properties | None
    at_monotonic_s: float

    @property
    def body(self) -> Any:
        return json.loads(self.payload)

    @property
    def kind(self) -> str:
        """The topic's part after the base: `state`, `field`, ..."""
        return self.topic.split("/")[4]


class Subscriber:
    """A subscriber with a session of its own at the broker: connects again by itself, keeps all that it hears."""

    def __init__(self, host: str, port: int, topics: tuple[str, ...], protocol: int, client_id: str) -> None:
        self._lock = threading.Condition()
        self._messages: list[Heard] = []
        self._is_subscribed = threading.Event()
        self._topics = topics
        is_v5 = protocol == mqtt.MQTTv5
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=protocol,
            **({} if is_v5 else {"clean_session": False}),
        )
        self._client.reconnect_delay_set(0.05, 0.2)  # type: ignore[arg-type]  # tests do not wait a whole second
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._is_subscribed.set()
        self._client.on_message = self._on_message
        kept: dict[str, Any] = {}
        if is_v5:
            expiry = Properties(PacketTypes.CONNECT)
            expiry.SessionExpiryInterval = 3600
            kept = {"clean_start": False, "properties": expiry}
        self._client.connect(host, port, keepalive=10, **kept)
        self._client.loop_start()
        assert self._is_subscribed.wait(10), "the broker did not take the subscription"

    @property
    def messages(self) -> list[Heard]:
        with self._lock:
            return list(self._messages)

    def of_kind(self, kind: str) -> list[Heard]:
        return [message for message in self.messages if message.kind == kind]

    def wait_for(self, is_enough: Callable[[list[Heard]], bool], timeout_s: float = 15) -> list[Heard]:
        """Wait until `is_enough(messages)`; fails with what was heard when the time is over."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            while not is_enough(list(self._messages)):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self._lock.wait(left_s):
                    if is_enough(list(self._messages)):
                        break
                    last = [(heard.topic, heard.payload[:120]) for heard in self._messages[-5:]]
                    raise AssertionError(f"heard {len(self._messages)} messages in {timeout_s} s, the last: {last}")
            return list(self._messages)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def reconnect(self) -> None:
        """Come back after `close`, into the session that the broker has kept."""
        self._client.reconnect()
        self._client.loop_start()

    def _on_connect(self, client: mqtt.Client, *_: Any) -> None:
        client.subscribe([(topic, 1) for topic in self._topics])

    def _on_message(self, _client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        heard = Heard(
            message.topic,
            bytes(message.payload),
            message.qos,
            bool(message.retain),
            getattr(message, "properties", None),
            time.monotonic(),
        )
        with self._lock:
            self._messages.append(heard)
            self._lock.notify_all()


@pytest.fixture
def subscriber() -> Iterator[Callable[..., Subscriber]]:
    """Factory `subscriber(broker, *topics, protocol=MQTTv5) -> Subscriber`, subscribed when it returns."""
    subscribers: list[Subscriber] = []

    def make(broker: Broker, *topics: str, protocol: int = mqtt.MQTTv5) -> Subscriber:
        client_id = f"ears-{len(subscribers)}"
        ears = Subscriber(broker.host, broker.port, topics or ("hv/1/#",), protocol, client_id)
        subscribers.append(ears)
        return ears

    yield make
    for ears in subscribers:
        ears.close()


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    """An empty one of device `dev` in the test's folder, at its first boot; it keeps no history."""
    begin_boot(tmp_path)
    with open_outbox(tmp_path, min_free_mb=0, device="dev") as opened:
        yield opened


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """Fails the test that leaves a thread of ours running."""
    before = set(threading.enumerate())
    yield
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        left = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
        if not left:
            return
        time.sleep(0.02)
    raise AssertionError(f"threads left alive: {left}")
