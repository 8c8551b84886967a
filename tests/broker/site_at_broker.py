"""A site made by make-site.sh, and people and devices that meet at its broker with their certificates."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from deploy.broker.make_site import Client, make_site

CLIENTS = (
    Client("device", "microscope-1"),
    Client("device", "microscope-2"),
    Client("receiver", "collector"),
    Client("operator", "anna"),
)

NOT_AUTHORISED = 0x87

ANSWER_S = 30.0
"""Against waiting for ever; on a busy machine a refusal that is heard at the third time takes seconds."""


class Site:
    """The folder that was made, and the files of each of its clients."""

    name = "lab"
    base = "hv/1/lab"

    def __init__(self, top: Path, **more: Any) -> None:
        self.top = top
        (top.parent / "data").mkdir(parents=True, exist_ok=True)
        given = {"hosts": ["127.0.0.1"], "at": str(top / "broker"), "data": str(top.parent / "data"), **more}
        make_site(top, site=self.name, clients=CLIENTS, **given)

    @property
    def mosquitto_lines(self) -> str:
        """The site's own mosquitto.conf, but for its listener: on loopback, on the test's port."""
        config = (self.top / "broker" / "mosquitto.conf").read_text()
        assert config.count("listener 8883\n") == 1
        return config.replace("listener 8883\n", "listener {port} 127.0.0.1\n")

    def tls(self, kind: str, name: str) -> dict[str, Any]:
        """The section `broker.tls` of the agent for one of the clients."""
        pair = Client(kind, name).pair(self.top)
        return {
            "enabled": True,
            "ca_file": self.top / "ca" / "ca.pem",
            "certificate_file": pair.certificate_file,
            "key_file": pair.key_file,
        }


class Person:
    """Somebody at the broker with a certificate; `hears` keeps topic and payload of all that comes."""

    def __init__(self, port: int, tls: dict[str, Any], client_id: str, protocol: int = mqtt.MQTTv5) -> None:
        self.hears: list[tuple[str, bytes]] = []
        self._answers: dict[int, int] = {}
        self._changed = threading.Condition()
        self._is_there = threading.Event()
        is_v5 = protocol == mqtt.MQTTv5
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=protocol,
            **({} if is_v5 else {"clean_session": False}),
        )
        self._client.reconnect_delay_set(0.05, 0.2)  # type: ignore[arg-type]  # tests do not wait a whole second
        self._client.tls_set(str(tls["ca_file"]), str(tls["certificate_file"]), str(tls["key_file"]))
        self._client.on_connect = lambda *_: self._is_there.set()
        self._client.on_subscribe = lambda _c, _u, mid, codes, _p: self._note(mid, codes[0].value)
        self._client.on_publish = lambda _c, _u, mid, code, _p: self._note(mid, code.value)
        self._client.on_message = self._hear
        session = {}
        if is_v5:
            expiry = Properties(PacketTypes.CONNECT)
            expiry.SessionExpiryInterval = 600
            session = {"clean_start": False, "properties": expiry}
        self._client.connect("127.0.0.1", port, keepalive=10, **session)
        self._client.loop_start()
        assert self._is_there.wait(ANSWER_S), "the broker does not take us"

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> int:
        """The broker's reason code."""
        return self._answer(self._client.publish(topic, payload, qos=1, retain=retain).mid)

    def codes(self, *topics: str) -> dict[str, int]:
        """The broker's reason code for a message to each of these.

        Mosquitto 2.0.11 hangs up after each refusal, now and then before we have read it: then the client connects
        anew, sends again all that has no answer, and is refused again.
        """
        mids = {topic: self._client.publish(topic, b"x", qos=1).mid for topic in topics}
        return {topic: self._answer(mid) for topic, mid in mids.items()}

    def subscribe(self, topic: str) -> int:
        mid = self._client.subscribe(topic, qos=1)[1]
        assert mid is not None
        return self._answer(mid)

    def wait_for(self, count: int, timeout_s: float = 10) -> list[tuple[str, bytes]]:
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while len(self.hears) < count:
                left_s = deadline_s - time.monotonic()
                assert left_s > 0, f"heard {len(self.hears)} of {count}"
                self._changed.wait(left_s)
            return list(self.hears)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _hear(self, _client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        with self._changed:
            self.hears.append((message.topic, bytes(message.payload)))
            self._changed.notify_all()

    def _note(self, mid: int, code: int) -> None:
        with self._changed:
            self._answers[mid] = code
            self._changed.notify_all()

    def _answer(self, mid: int) -> int:
        deadline_s = time.monotonic() + ANSWER_S
        with self._changed:
            while mid not in self._answers:
                left_s = deadline_s - time.monotonic()
                assert left_s > 0, "no answer from the broker"
                self._changed.wait(left_s)
            return self._answers[mid]
