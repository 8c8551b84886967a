"""A subscriber: what anybody at the broker sees of the agents. The demo's table is filled from here and only here."""

from __future__ import annotations

import json
import queue
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from agent.errors import BrokerUnavailable

KEEPALIVE_S = 10


@dataclass(frozen=True, slots=True)
class Heard:
    """One message. kind: the topic's word after the device: `field`, `cell`, `state`; body: the decoded JSON."""

    topic: str
    kind: str
    body: dict[str, Any]


class Subscriber:
    """Connected and subscribed; connects again by itself.

    The callbacks only put into a queue: they run under paho's lock.
    """

    def __init__(self, client: mqtt.Client, arrived: queue.SimpleQueue[mqtt.MQTTMessage]) -> None:
        self._client = client
        self._arrived = arrived

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def receive(self, timeout_s: float) -> Heard | None:
        """The next message, or None when none came in time. A payload that is no JSON object is passed over."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                message = self._arrived.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                return None
            if (heard := _decode(message)) is not None:
                return heard

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def open_subscriber(host: str, port: int, topic_filter: str, timeout_s: float = 15.0) -> Subscriber:
    """Connect and subscribe with QoS 1, MQTT 3.1.1 (which every broker speaks); tries until `timeout_s` is over.

    Raises BrokerUnavailable.
    """
    arrived: queue.SimpleQueue[mqtt.MQTTMessage] = queue.SimpleQueue()
    is_subscribed = threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
    client.reconnect_delay_set(1, 5)

    def subscribe(*_: object) -> None:
        client.subscribe(topic_filter, qos=1)

    client.on_connect = subscribe
    client.on_subscribe = lambda *_: is_subscribed.set()
    client.on_message = lambda _client, _userdata, message: arrived.put(message)
    # connect_async: the first attempt is made, and repeated, by the network thread.
    client.connect_async(host, port, KEEPALIVE_S)
    client.loop_start()
    if not is_subscribed.wait(timeout_s):
        client.loop_stop()
        raise BrokerUnavailable(f"{host}:{port}: no answer to the subscription within {timeout_s:g} s")
    return Subscriber(client, arrived)


def _decode(message: mqtt.MQTTMessage) -> Heard | None:
    try:
        body = json.loads(message.payload)
    except ValueError:
        return None
    parts = message.topic.split("/")
    return Heard(message.topic, parts[4], body) if isinstance(body, dict) and len(parts) > 4 else None
