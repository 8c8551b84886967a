"""One connection to the broker: all that is particular about MQTT and its client library stands here.

A `BrokerLink` lives from CONNECT to the end of the connection and is then thrown away; the next connection gets a new
one, so nothing half sent is left in it. It has no thread: its owner calls `turn`, which waits for the network, does
what is to be done and tells what happened.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import paho.mqtt.client as mqtt
from paho.mqtt import MQTTException
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from agent.config import BROKER_PASSWORD_VARIABLE, BrokerSection, read_secret
from agent.delivery.certificates import (
    NotingSocket,
    refusal_of_ours,
    refusal_of_theirs,
    shown_certificate_ends_at,
)
from agent.errors import BrokerRefused, BrokerUnavailable, ConfigError

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
"""For the TCP connection, then again for the TLS handshake."""

CONNACK_TIMEOUT_S = 5.0
"""A frozen broker's kernel still takes the connection, but nobody answers."""

ASK_AGAIN_S = 5.0
"""A cluster that is electing a leader refuses subscriptions for some seconds; who took that as the last word would
never hear of anything again."""

CONTENT_TYPE = "application/json"

MOST_UNACKNOWLEDGED = 65_535
"""The protocol's own limit; ours is the window, kept by the owner."""

_BAD_PROTOCOL = 0x84
_REFUSED = frozenset({0x85, 0x86, 0x87, 0x8A, 0x8C})
"""CONNACK codes that an operator must mend: client id, user or password, not authorised, banned, bad method."""

_FOREIGN_WORDS = (MQTTException, ValueError, LookupError, TypeError, AssertionError, struct.error)
"""What the client library raises over bytes that are not MQTT."""


class ProtocolRefused(BrokerUnavailable):
    """The broker does not speak this version of MQTT."""


class HungUp(BrokerUnavailable):
    """The broker took the connection and closed it without an answer to our CONNECT."""


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The broker's PUBACK. code: 0 to 127 = taken, from 128 = refused, with the reason in words."""

    mid: int
    code: int
    reason: str

    @property
    def is_taken(self) -> bool:
        return self.code < 0x80


@dataclass(frozen=True, slots=True)
class Received:
    """One message for us. mid: the broker's number for it on this connection; 0 with QoS 0.

    is_repeat: the broker has sent it before and got no PUBACK. response_topic, correlation: where and under which name
    the sender wants an answer; expires_in_s: for how long it still holds (MQTT 5; None = not told).
    """

    mid: int
    topic: str
    payload: bytes
    qos: int
    is_retained: bool
    is_repeat: bool
    response_topic: str | None = None
    correlation: bytes | None = None
    expires_in_s: int | None = None


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The broker's SUBACK for one filter. code: 0 to 2 = the QoS granted, from 128 = refused."""

    topic_filter: str
    code: int
    reason: str

    @property
    def is_granted(self) -> bool:
        return self.code < 0x80


@dataclass(frozen=True, slots=True)
class Session:
    """What the broker is to keep for us between two connections: subscriptions and what was not acknowledged.

    expiry_s: how long (MQTT 5; with 3.1.1 the broker decides). receive_maximum: most messages that it may send
        unacknowledged (MQTT 5).
    Messages that come in a session are acknowledged by `BrokerLink.confirm`, not on arrival.
    """

    expiry_s: int
    receive_maximum: int


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker is to publish, retained and with QoS 1, when this connection is lost."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Passing:
    """A message that is said once and not kept: a reply, a picture. correlation: the asker's mark (MQTT 5)."""

    topic: str
    payload: bytes
    content_type: str = CONTENT_TYPE
    correlation: bytes | None = None


class PackedProperties(Properties):
    """Properties of all messages of a kind, made bytes once: the library does so for each, a fifth of its work."""

    _packed: bytes

    def __init__(self, properties: Properties) -> None:
        super().__init__(properties.packetType)  # type: ignore[no-untyped-call]
        # Past the library's check, which knows the names of the protocol only.
        object.__setattr__(self, "_packed", properties.pack())  # type: ignore[no-untyped-call]

    def pack(self) -> bytes:
        return self._packed


class BrokerLink:
    """One connection, made by `open_link`; belongs to one thread.

    protocol: `5` or `3.1.1`. window: most messages that the broker takes unacknowledged. max_packet_bytes: None = the
    broker did not tell. closed_reason: why the connection is gone; None while it stands. was_hung_up: the
    broker or the network ended it; not we, and not the keep-alive. is_taken_over: by another client of the same name.
    has_session: the broker has kept the session of the last connection. shares: it knows shared subscriptions.
    certificate_ends_at: of the broker's certificate; None without TLS.
    """

    def __init__(self, section: BrokerSection, client_id: str, protocol: str, session: Session | None = None) -> None:
        self.protocol = protocol
        self.window = MOST_UNACKNOWLEDGED
        self.max_packet_bytes: int | None = None
        self.closed_reason: str | None = None
        self.was_hung_up = False
        self.is_taken_over = False
        self.has_session = False
        self.shares = False
        self.certificate_ends_at: datetime | None = None
        self._host, self._port, self._keepalive_s = section.host, section.port, section.keepalive_s
        self._sock: mqtt.SocketLike | None = None
        self._connack: tuple[int, str] | None = None
        self._acknowledged: deque[Acknowledged] = deque()
        self._received: deque[Received] = deque()
        self._subscribed: deque[Subscribed] = deque()
        self._asked: dict[int, tuple[str, ...]] = {}
        self._ask_again_at_s: dict[str, float] = {}
        self._session = session
        self._properties: dict[int | None, tuple[Properties, int]] = {}
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            # Nothing of an agent stays at the broker between two connections: the outbox is the session.
            clean_session=None if self.is_v5 else session is None,
            protocol=MQTTProtocolVersion.MQTTv5 if self.is_v5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=session is not None,
        )
        self._client.max_inflight_messages_set(MOST_UNACKNOWLEDGED)
        self._client.connect_timeout = CONNECT_TIMEOUT_S
        self._client.on_socket_open = self._on_socket_open
        self._client.on_connect = self._on_connect
        self._client.on_publish = self._on_publish
        self._client.on_message = self._on_message
        self._client.on_subscribe = self._on_subscribe
        self._client.on_disconnect = self._on_disconnect

    @property
    def is_v5(self) -> bool:
        return self.protocol == "5"

    @property
    def is_closed(self) -> bool:
        return self.closed_reason is not None

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expiry_s: int | None = None) -> int:
        """Send with QoS 1; the answer comes as `Acknowledged` with the number returned here."""
        properties = self._publish_properties(expiry_s)[0] if self.is_v5 else None
        return self._client.publish(topic, payload, qos=1, retain=retain, properties=properties).mid

    def publish_passing(self, passing: Passing) -> int:
        """Send something that is said once and not kept, with QoS 1; the answer comes as `Acknowledged`."""
        properties = self._passing_properties(passing) if self.is_v5 else None
        return self._client.publish(passing.topic, passing.payload, qos=1, properties=properties).mid

    def passing_bytes(self, passing: Passing) -> int:
        """How long the PUBLISH packet of this is, at most."""
        rest = 2 + len(passing.topic.encode()) + 2 + len(passing.payload)
        if self.is_v5:
            rest += len(self._passing_properties(passing).pack())  # type: ignore[no-untyped-call]
        return 5 + rest

    def subscribe(self, topic_filters: Sequence[str]) -> None:
        """Ask for topics with QoS 1; the answers come by `take_subscribed`, the messages by `take_received`.

        What is refused is asked for again every ASK_AGAIN_S, and told when it is granted after all.
        """
        _, mid = self._client.subscribe([(topic_filter, 1) for topic_filter in topic_filters])
        if mid is not None:
            self._asked[mid] = tuple(topic_filters)

    def take_subscribed(self) -> list[Subscribed]:
        """The answers that have come since the last time."""
        return _taken(self._subscribed)

    def take_received(self) -> list[Received]:
        """The messages that have come since the last time, in the order of their coming."""
        return _taken(self._received)

    def confirm(self, received: Received) -> None:
        """Send the PUBACK of a message of this connection: from now on the broker may forget it. See `Session`."""
        if received.qos > 0:
            self._client.ack(received.mid, received.qos)

    def packet_bytes(self, topic: str, payload: bytes, *, expiry_s: int | None = None) -> int:
        """How long the PUBLISH packet of this message is."""
        rest = 2 + len(topic.encode()) + 2 + len(payload)
        if self.is_v5:
            rest += self._publish_properties(expiry_s)[1]
        return 1 + (1 if rest < 128 else 2 if rest < 16_384 else 3 if rest < 2_097_152 else 4) + rest

    def turn(self, timeout_s: float, waker_fd: int | None = None) -> list[Acknowledged]:
        """Wait for the network or the waker, read and write what is there. Returns what was acknowledged."""
        sock = self._client.socket()
        if sock is not None:
            try:
                self._ask_again()
                self._turn(sock, timeout_s, waker_fd)
            except (OSError, *_FOREIGN_WORDS) as error:
                self.was_hung_up = True
                self._close(f"what came from the broker is not MQTT ({type(error).__name__}: {error})")
        if self._client.socket() is None:
            self._close("the connection was closed")
        return _taken(self._acknowledged)

    def disconnect(self, timeout_s: float = 1.0) -> None:
        """Say goodbye, so that the broker does not publish the Will, and close."""
        self._client.disconnect()
        deadline_s = time.monotonic() + timeout_s
        while not self.is_closed and time.monotonic() < deadline_s:
            self.turn(0.05)
        self.abandon()

    def abandon(self, reason: str = "closed here") -> None:
        """Close without a word; the broker publishes the Will."""
        self._close(reason)
        sock = self._client.socket()
        if sock is not None:
            sock.close()

    # ---- opening

    def _open(self, will: Will | None, username: str | None, password: str | None, tls: ssl.SSLContext | None) -> None:
        where = f"{self._host}:{self._port}"
        if username is not None:
            self._client.username_pw_set(username, password)
        if tls is not None:
            self._client.tls_set_context(tls)
        if will is not None:
            will_properties = self._content_properties(PacketTypes.WILLMESSAGE) if self.is_v5 else None
            self._client.will_set(will.topic, will.payload, qos=1, retain=True, properties=will_properties)
        try:
            self._client.connect(self._host, self._port, keepalive=self._keepalive_s, **self._only_v5())
        except ssl.SSLCertVerificationError as error:
            raise BrokerRefused(f"broker {where}: {refusal_of_theirs(error, datetime.now(timezone.utc))}") from error
        except ssl.SSLError as error:
            if (told := refusal_of_ours(error)) is not None:
                raise BrokerRefused(f"broker {where}: refuses us: {told}") from error
            raise BrokerUnavailable(
                f"broker {where}: no TLS connection ({error.reason or error}); does this port speak TLS?"
            ) from error
        except (OSError, ValueError) as error:
            raise BrokerUnavailable(f"broker {where}: not reachable ({error})") from error
        self._await_connack(where)

    def _await_connack(self, where: str) -> None:
        deadline_s = time.monotonic() + CONNACK_TIMEOUT_S
        while self._connack is None and not self.is_closed:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                self.abandon()
                raise BrokerUnavailable(f"broker {where}: took the connection and did not answer")
            self.turn(left_s)
        if self._connack is None:
            if (told := refusal_of_ours(getattr(self._sock, "alert", None))) is not None:
                raise BrokerRefused(f"broker {where}: refuses us: {told}")
            hint = "accept this device's certificate" if isinstance(self._sock, ssl.SSLSocket) else "ask for TLS"
            raise HungUp(f"broker {where}: closed the connection without an answer; does it {hint}?")
        code, reason = self._connack
        if code == 0:
            return
        self.abandon()
        if code == _BAD_PROTOCOL:
            raise ProtocolRefused(f"broker {where}: does not speak MQTT {self.protocol}")
        if code in _REFUSED:
            raise BrokerRefused(
                f"broker {where}: refuses us ({reason}); see broker.username, broker.password_file and its own rights"
            )
        raise BrokerUnavailable(f"broker {where}: not ready ({reason})")

    def _only_v5(self) -> dict[str, Any]:
        """Arguments of CONNECT that paho refuses with 3.1.1."""
        if not self.is_v5:
            return {}
        if self._session is None:
            return {"clean_start": True}
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._session.expiry_s
        properties.ReceiveMaximum = self._session.receive_maximum
        return {"clean_start": False, "properties": properties}

    # ---- inside

    def _ask_again(self) -> None:
        now_s = time.monotonic()
        due = [topic_filter for topic_filter, at_s in self._ask_again_at_s.items() if at_s <= now_s]
        if due:
            self._ask_again_at_s.update(dict.fromkeys(due, math.inf))  # until the answer is here
            self.subscribe(due)

    def _turn(self, sock: mqtt.SocketLike, timeout_s: float, waker_fd: int | None) -> None:
        pending = getattr(sock, "pending", None)
        if pending is not None and pending() > 0:
            timeout_s = 0  # TLS has read more than it has handed out; the kernel would not tell
        poll = select.poll()
        fd = sock.fileno()
        poll.register(fd, select.POLLIN | (select.POLLOUT if self._client.want_write() else 0))
        if waker_fd is not None:
            poll.register(waker_fd, select.POLLIN)
        events = dict(poll.poll(max(0.0, timeout_s) * 1000)).get(fd, 0)
        if events & ~select.POLLOUT or timeout_s == 0:
            self._client.loop_read()
        if events & select.POLLOUT and self._client.socket() is not None:
            self._client.loop_write()
        if self._client.socket() is not None:
            self._client.loop_misc()

    def _publish_properties(self, expiry_s: int | None) -> tuple[Properties, int]:
        """The properties of a PUBLISH, and their length in bytes; made once."""
        if expiry_s not in self._properties:
            properties = self._content_properties(PacketTypes.PUBLISH)
            if expiry_s is not None:
                properties.MessageExpiryInterval = expiry_s
            packed = PackedProperties(properties)
            self._properties[expiry_s] = packed, len(packed.pack())
        return self._properties[expiry_s]

    @staticmethod
    def _passing_properties(passing: Passing) -> Properties:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.PayloadFormatIndicator = int(passing.content_type == CONTENT_TYPE)
        properties.ContentType = passing.content_type
        if passing.correlation is not None:
            properties.CorrelationData = passing.correlation
        return properties

    @staticmethod
    def _content_properties(packet_type: int) -> Properties:
        properties = Properties(packet_type)  # type: ignore[no-untyped-call]
        properties.PayloadFormatIndicator = 1  # UTF-8
        properties.ContentType = CONTENT_TYPE
        return properties

    def _close(self, reason: str) -> None:
        if self.closed_reason is None:
            self.closed_reason = reason

    # Called by paho, under its locks: they only note what happened.

    def _on_socket_open(self, _client: mqtt.Client, _userdata: Any, sock: mqtt.SocketLike) -> None:
        self._sock = sock  # the library forgets it when it closes it

    def _on_connect(
        self,
        _client: mqtt.Client,
        _userdata: Any,
        flags: mqtt.ConnectFlags,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        self._connack = (code.value, str(code))
        self.has_session = bool(flags.session_present)
        self.certificate_ends_at = shown_certificate_ends_at(self._sock)
        # MQTT 5: available unless the broker says no.
        self.shares = self.is_v5 and bool(getattr(properties, "SharedSubscriptionAvailable", 1))
        self.window = int(getattr(properties, "ReceiveMaximum", MOST_UNACKNOWLEDGED))
        max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        self.max_packet_bytes = None if max_packet_bytes is None else int(max_packet_bytes)

    def _on_publish(self, _client: mqtt.Client, _userdata: Any, mid: int, code: ReasonCode, _properties: Any) -> None:
        self._acknowledged.append(Acknowledged(mid, code.value, str(code)))

    def _on_message(self, _client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        properties = getattr(message, "properties", None)  # none with 3.1.1
        self._received.append(
            Received(
                message.mid,
                _topic_of(message),
                bytes(message.payload),
                message.qos,
                bool(message.retain),
                bool(message.dup),
                getattr(properties, "ResponseTopic", None),
                getattr(properties, "CorrelationData", None),
                getattr(properties, "MessageExpiryInterval", None),
            )
        )

    def _on_subscribe(
        self, _client: mqtt.Client, _userdata: Any, mid: int, codes: list[ReasonCode], _properties: Any
    ) -> None:
        for topic_filter, code in zip(self._asked.pop(mid, ()), codes, strict=False):
            answer = Subscribed(topic_filter, code.value, str(code))
            is_known = not answer.is_granted and topic_filter in self._ask_again_at_s
            if answer.is_granted:
                self._ask_again_at_s.pop(topic_filter, None)
            else:
                self._ask_again_at_s[topic_filter] = time.monotonic() + ASK_AGAIN_S
            if not is_known:
                self._subscribed.append(answer)

    def _on_disconnect(
        self, _client: mqtt.Client, _userdata: Any, flags: mqtt.DisconnectFlags, code: ReasonCode, _properties: Any
    ) -> None:
        is_told = flags.is_disconnect_packet_from_server
        self.is_taken_over = is_told and code.value == 0x8E
        self.was_hung_up = is_told or code.getName() != "Keep alive timeout"
        self._close(f"the broker closed it: {code}" if is_told else str(code))


def open_link(
    section: BrokerSection,
    *,
    client_id: str,
    protocol: str,
    will: Will | None,
    session: Session | None = None,
    environ: Mapping[str, str] = os.environ,
) -> BrokerLink:
    """Connect and wait for the broker's word. The secrets are read anew each time, so that they can be mended.

    will: None = the broker says nothing when the connection is lost. session: None = nothing is kept.
    Raises BrokerRefused (password, certificate, rights), ProtocolRefused (version), BrokerUnavailable (all else).
    """
    link = BrokerLink(section, client_id, protocol, session)
    link._open(will, section.username, _password(section, environ), _tls_context(section))
    return link


def _password(section: BrokerSection, environ: Mapping[str, str]) -> str | None:
    """Read anew for each connection: a mended password file needs no restart."""
    try:
        return read_secret(section.password_file, BROKER_PASSWORD_VARIABLE, environ)
    except ConfigError as error:
        raise BrokerRefused(f"broker.password_file {error.source}: {'; '.join(error.faults)}") from None


def _tls_context(section: BrokerSection) -> ssl.SSLContext | None:
    tls = section.tls
    if not tls.enabled:
        return None
    context: ssl.SSLContext = _loaded(
        "broker.tls.ca_file", tls.ca_file, lambda: ssl.create_default_context(cafile=tls.ca_file)
    )
    # From Python 3.13 on this is set, and refuses authorities that laboratories made by many a guide (no key usage).
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.sslsocket_class = NotingSocket
    if tls.certificate_file is not None:
        certificate_file, key_file = tls.certificate_file, tls.key_file
        _loaded(
            "broker.tls.certificate_file",
            certificate_file,
            # A key with a passphrase would ask on the terminal and wait for ever; an empty one fails at once.
            lambda: context.load_cert_chain(certificate_file, key_file, password=""),
        )
    return context


def _loaded(key: str, path: Path | None, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise BrokerRefused(f"{key} {path}: cannot be used ({error})") from error


def _topic_of(message: mqtt.MQTTMessage) -> str:
    try:
        return message.topic
    except UnicodeDecodeError:  # MQTT forbids it; not every broker looks
        return "?"


def _taken(waiting: deque[T]) -> list[T]:
    """What is there, taken out."""
    taken = list(waiting)
    waiting.clear()
    return taken


class Waker:
    """Wakes a thread that waits in `BrokerLink.turn` or in `wait`; `wake` may be called from any thread."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def fileno(self) -> int:
        return self._receiver.fileno()

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody waits any more
            self._sender.send(b"\0")

    def was_woken(self) -> bool:
        """Whether somebody called since the last time; takes the calls back."""
        try:
            return bool(self._receiver.recv(65536))
        except OSError:
            return False

    def wait(self, timeout_s: float) -> bool:
        """Sleep until woken or until the time is over."""
        poll = select.poll()
        poll.register(self._receiver, select.POLLIN)
        poll.poll(max(0.0, timeout_s) * 1000)
        return self.was_woken()

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()
