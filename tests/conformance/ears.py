"""A client of the kit at the broker: hears everything of one device, and sends."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

CONNECT_S = 10.0
"""For the broker's word: that we are connected and subscribed, that it has what we sent."""


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach the broker."""

    host: str
    port: int
    username: str | None = None
    password: str | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    protocol: str = "5"
    """`5` or `3.1.1`; `settled` turns `auto` into one of them."""

    @property
    def is_v5(self) -> bool:
        return self.protocol == "5"

    def settled(self) -> Access:
        """With a protocol that the broker speaks. Raises Unreachable: it does not take us at all."""
        if self.protocol != "auto":
            return self
        newest = dataclasses.replace(self, protocol="5")
        try:
            Ears(newest, (), "").close()
        except Unreachable as error:
            # A refusal of the version has words in MQTT 5 only: some brokers say 3.1.1's, some hang up.
            older = dataclasses.replace(self, protocol="3.1.1")
            try:
                Ears(older, (), "").close()
            except Unreachable:
                raise error from None
            return older
        return newest


@dataclass(frozen=True, slots=True)
class Heard:
    """One message. kind: the word behind the device; body: None where it is no JSON object."""

    topic: str
    kind: str
    payload: bytes
    qos: int
    is_retained: bool
    content_type: str | None
    correlation: bytes | None
    at_s: float
    body: dict[str, Any] | None


class Unreachable(Exception):
    """The broker does not take us, not our subscription, or not what we send. Its words name the broker."""


class Ears:
    """Connected and subscribed when made; keeps all that it hears in the order of its coming."""

    def __init__(
        self,
        access: Access,
        topics: tuple[str, ...],
        base: str,
        client_id: str = "",
        will: tuple[str, bytes] | None = None,
    ) -> None:
        """topics: none = only connected. base: of the device, without a slash at its end. will: topic and payload.

        Raises Unreachable.
        """
        self._base = base
        self._where = f"{access.host}:{access.port}"
        self._lock = threading.Condition()
        self._heard: list[Heard] = []
        self._topics = topics
        self._refusals: dict[int, str] = {}
        self._is_settled = threading.Event()
        self._refusal: str | None = "no answer"
        protocol = mqtt.MQTTv5 if access.is_v5 else mqtt.MQTTv311
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=protocol)
        if access.username is not None:
            self.client.username_pw_set(access.username, access.password)
        if access.ca_file is not None:
            certificate = None if access.certificate_file is None else str(access.certificate_file)
            self.client.tls_set(
                str(access.ca_file), certificate, None if access.key_file is None else str(access.key_file)
            )
        if will is not None:
            self.client.will_set(*will, qos=1)
        self.client.on_message = self._on_message
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = self._on_subscribe
        self.client.on_publish = self._on_publish
        self.client.on_disconnect = self._on_disconnect
        try:
            self.client.connect(access.host, access.port, keepalive=20)
        except OSError as error:
            raise Unreachable(f"{self._where}: {error}") from error
        self.client.loop_start()
        self._is_settled.wait(CONNECT_S)
        if self._refusal is not None:
            self.close()
            raise Unreachable(f"{self._where}: {self._refusal} (MQTT {access.protocol})")

    @property
    def heard(self) -> list[Heard]:
        with self._lock:
            return list(self._heard)

    def wait_for(self, is_it: Callable[[Heard], bool], timeout_s: float, since: int = 0) -> Heard | None:
        """The first message, from the number `since` on, that is it; None when none came in time."""
        deadline_s = time.monotonic() + timeout_s
        looked = since
        with self._lock:
            while True:
                for heard in self._heard[looked:]:
                    if is_it(heard):
                        return heard
                looked = len(self._heard)
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return None
                self._lock.wait(left_s)

    def send(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        response_topic: str | None = None,
        correlation: bytes | None = None,
    ) -> None:
        """Publish with QoS 1; returns when the broker has it. Raises Unreachable."""
        properties = None
        if self.client.protocol == mqtt.MQTTv5:
            properties = Properties(PacketTypes.PUBLISH)
            if response_topic is not None:
                properties.ResponseTopic = response_topic
            if correlation is not None:
                properties.CorrelationData = correlation
        sent = self.client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        try:
            sent.wait_for_publish(CONNECT_S)
        except RuntimeError as error:
            raise Unreachable(f"{self._where}: takes nothing of ours on {topic} ({error})") from error
        if not sent.is_published():
            raise Unreachable(f"{self._where}: no acknowledgement of ours on {topic}")
        if (refusal := self._refusals.pop(sent.mid, None)) is not None:
            raise Unreachable(f"{self._where}: takes nothing of ours on {topic} ({refusal})")

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def _on_connect(self, client: mqtt.Client, _userdata: Any, _flags: Any, code: Any, _properties: Any) -> None:
        if code.is_failure:
            self._settle(f"the broker refuses the connection: {code}")
        elif self._topics:
            client.subscribe([(topic, 1) for topic in self._topics])
        else:
            self._settle(None)

    def _on_subscribe(self, _client: Any, _userdata: Any, _mid: Any, codes: Any, _properties: Any) -> None:
        refused = [str(code) for code in codes if code.is_failure]
        words = f"it refuses our subscription: {', '.join(refused)}; has this user the right to read?"
        self._settle(words if refused else None)

    def _on_publish(self, _client: Any, _userdata: Any, mid: int, code: Any, _properties: Any) -> None:
        if code.is_failure:  # the library calls this before it wakes who waits for the acknowledgement
            self._refusals[mid] = str(code)

    def _on_disconnect(self, _client: Any, _userdata: Any, _flags: Any, code: Any, _properties: Any) -> None:
        self._settle(f"the broker closed the connection: {code}")

    def _settle(self, refusal: str | None) -> None:
        """The first word of the broker about us; later ones do not change it."""
        if not self._is_settled.is_set():
            self._refusal = refusal
            self._is_settled.set()

    def _on_message(self, _client: Any, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        properties = getattr(message, "properties", None)
        try:
            body = json.loads(message.payload)
        except ValueError:
            body = None
        kind = message.topic.removeprefix(f"{self._base}/").split("/")[0]
        heard = Heard(
            message.topic,
            kind if message.topic.startswith(f"{self._base}/") else "",
            bytes(message.payload),
            message.qos,
            bool(message.retain),
            getattr(properties, "ContentType", None),
            getattr(properties, "CorrelationData", None),
            time.monotonic(),
            body if isinstance(body, dict) else None,
        )
        with self._lock:
            self._heard.append(heard)
            self._lock.notify_all()
