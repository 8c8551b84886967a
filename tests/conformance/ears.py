"""A client of the kit at the broker: hears everything of one device, and sends."""

from __future__ import annotations

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

    @property
    def is_v5(self) -> bool:
        return self.protocol == "5"


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
    """The broker does not take us, or not our subscription."""


class Ears:
    """Connected and subscribed when made; keeps all that it hears in the order of its coming."""

    def __init__(self, access: Access, topics: tuple[str, ...], base: str, client_id: str = "") -> None:
        self._base = base
        self._lock = threading.Condition()
        self._heard: list[Heard] = []
        self._is_subscribed = threading.Event()
        self._refusal = ""
        protocol = mqtt.MQTTv5 if access.is_v5 else mqtt.MQTTv311
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=protocol)
        if access.username is not None:
            self.client.username_pw_set(access.username, access.password)
        if access.ca_file is not None:
            certificate = None if access.certificate_file is None else str(access.certificate_file)
            self.client.tls_set(
                str(access.ca_file), certificate, None if access.key_file is None else str(access.key_file)
            )
        self.client.on_message = self._on_message
        self.client.on_connect = lambda client, *_: client.subscribe([(topic, 1) for topic in topics])
        self.client.on_subscribe = self._on_subscribe
        try:
            self.client.connect(access.host, access.port, keepalive=20)
        except OSError as error:
            raise Unreachable(f"{access.host}:{access.port}: {error}") from error
        self.client.loop_start()
        if not self._is_subscribed.wait(10):
            self.close()
            raise Unreachable(f"{access.host}:{access.port}: no answer to our subscription {self._refusal}")

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
        """Publish with QoS 1; returns when the broker has it."""
        properties = None
        if self.client.protocol == mqtt.MQTTv5:
            properties = Properties(PacketTypes.PUBLISH)
            if response_topic is not None:
                properties.ResponseTopic = response_topic
            if correlation is not None:
                properties.CorrelationData = correlation
        self.client.publish(topic, payload, qos=1, retain=retain, properties=properties).wait_for_publish(10)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def _on_subscribe(self, _client: Any, _userdata: Any, _mid: Any, codes: Any, _properties: Any) -> None:
        refused = [str(code) for code in codes if code.is_failure]
        if refused:
            self._refusal = f"({', '.join(refused)}: has this user the right to read?)"
        else:
            self._is_subscribed.set()

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
