"""The publisher against a real mosquitto: nothing is missing, everything in order, whatever happens to the broker."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jsonschema
import paho.mqtt.client as mqtt
import pytest

from agent.config import BrokerSection, DeliverySection
from agent.delivery import publisher as publisher_module
from agent.delivery import window as window_module
from agent.delivery.link import Acknowledged, BrokerLink, Waker, Will, open_link
from agent.delivery.messages import Draft, RetainedDocument, event_draft, health_body, info_body, load_schema
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.delivery.publisher import SILENT_ENDS, Backoff, Publisher
from agent.delivery.topics import Topics
from agent.delivery.window import FETCH_ROWS, STORE_TOGETHER, Documents, Window
from agent.domain import AgentState, ClockReading
from agent.errors import BrokerRefused, BrokerUnavailable, OutboxError
from agent.health import Health, MachineReading

TOPICS = Topics("lab", "scope")
AT = datetime(2026, 11, 23, 8, 0, tzinfo=timezone.utc)
NOBODY_SUBSCRIBED, NOT_AUTHORISED, QUOTA_EXCEEDED = 0x10, 0x87, 0x97
ONLINE = "max_inflight_messages 0\nmax_queued_messages 0"
"""mosquitto hands everything on at once: nothing that it has acknowledged waits in it when it is killed."""

pytestmark = pytest.mark.usefixtures("no_thread_left")


def field_draft(n: int, filler: str = "") -> Draft:
    """A field message with all keys that its schema asks for; the frame's number tells them apart."""
    model = {"name": "m", "version": "1", "sha256": "a" * 64}
    body = {
        "schema": "hv/1/field",
        "device": "scope",
        "site": "lab",
        "sample": "s1",
        "captured_at": "2026-11-23T08:00:00.000Z",
        "captured_monotonic_ns": 1,
        "clock": {"synchronised": True, "offset_ms": None},
        "frame": {"n": n, "sha256_16": "0" * 16, "width_px": 1, "height_px": 1, "focus": 1.0, "clipped_pct": 0.0},
        "quality": {"accepted": True, "reasons": [filler] if filler else []},
        "timing_ms": {"total": 1.0},
        "counts": {},
        "unique_counts": {},
        "duplicates": 0,
        "cells": [],
        "provenance": {
            "agent": "0.1.0",
            "detector": model,
            "classifier": model,
            "runtime": "r",
            "delegate": "none",
            "config_sha256": "b" * 64,
        },
    }
    return Draft("field", TOPICS.field("s1"), body)


def info() -> dict[str, Any]:
    return info_body(
        device="scope",
        site="lab",
        boot=1,
        started_at=AT,
        agent_version="0.1.0",
        models=[],
        config_sha256="c" * 64,
        runtime="r",
        delegate="none",
    )


def health_numbers(health: Health) -> dict[str, Any]:
    reading = MachineReading(None, None, None, None, ClockReading(is_synchronised=True))
    return health_body(
        health.snapshot(), reading, device="scope", site="lab", boot=1, at=AT, state=AgentState.READY, interval_s=30
    )


class Listener:
    """Somebody who subscribes to everything, so that the broker takes it; comes back when the broker does."""

    def __init__(self, broker: Any) -> None:
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self._client.reconnect_delay_set(0.05, 0.05)
        self._client.on_connect = lambda client, *_: client.subscribe("hv/#", qos=0)
        self._client.connect_async(broker.host, broker.port, keepalive=2)
        self._client.loop_start()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Bench:
    """An outbox, a publisher on it and its health; several publishers one after the other are restarts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.boot = begin_boot(folder)
        self.health = Health()
        self.publisher: Publisher | None = None
        self.listener: Listener | None = None
        self.outbox = self.open()
        self.fields = 0

    def open(self) -> Outbox:
        return open_outbox(self.folder, device="scope", min_free_mb=0)

    def append(self, count: int, filler: str = "") -> None:
        for _ in range(count):
            self.fields += 1
            self.outbox.append([field_draft(self.fields, filler)])

    def start(self, broker: Any, **options: Any) -> Publisher:
        if self.listener is None and not options.get("tls") and not options.get("username"):
            self.listener = Listener(broker)
        section = {"host": broker.host, "port": broker.port, "max_backoff_s": 0.3, "keepalive_s": 2}
        named: dict[str, Any] = {
            "topics": TOPICS,
            "boot": self.boot,
            "open_outbox": lambda: open_outbox(self.folder, device="scope", min_free_mb=0, verify=False),
            "health": self.health,
        }
        section_changes = {key: options.pop(key) for key in list(options) if key in BrokerSection.model_fields}
        self.publisher = Publisher(broker=BrokerSection(**{**section, **section_changes}), **{**named, **options})
        self.publisher.start()
        return self.publisher

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = 20, why: str = "") -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline_s, f"{why}; {self.outbox.depth()} rows wait, {self.health.snapshot()}"
            assert self.publisher is None or self.publisher.failure is None, self.publisher.failure
            time.sleep(0.005)

    def waiting(self) -> set[int]:
        """The numbers of the fields that are in the outbox; each is a message, so they have those of the stream."""
        return {row.seq for row in self.outbox.pending(0, self.fields)}

    def wait_empty(self, timeout_s: float = 20) -> None:
        self.wait_until(lambda: self.outbox.depth() == 0, timeout_s, "the outbox does not become empty")

    def close(self) -> None:
        if self.publisher is not None:
            self.publisher.stop(0)
        if self.listener is not None:
            self.listener.close()
        self.outbox.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "outbox")
    yield made
    made.close()
    assert made.publisher is None or made.publisher.failure is None


def check_all(messages: list[Any]) -> None:
    """Every message that left is valid by the schema of its topic, sent with QoS 1."""
    for heard in messages:
        jsonschema.Draft202012Validator(load_schema(heard.kind)).validate(heard.body)
        assert heard.qos == 1


def frames(messages: list[Any]) -> list[int]:
    return [heard.body["frame"]["n"] for heard in messages if heard.kind == "field"]


def states(messages: list[Any]) -> list[str]:
    return [heard.body["state"] for heard in messages if heard.kind == "state"]


def without_repeats(numbers: list[int]) -> list[int]:
    return list(dict.fromkeys(numbers))


# ------------------------------------------------------------------------------------------------------- in good days


def test_documents_come_first_and_rows_in_order_and_all_are_valid(
    bench: Bench, mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker)
    bench.append(100)
    bench.outbox.append([event_draft("agent-started", "started", TOPICS, at=AT)])
    bench.health.broker_state("connecting")
    publisher = Publisher(
        topics=TOPICS,
        broker=BrokerSection(port=broker.port),
        boot=bench.boot,
        open_outbox=lambda: open_outbox(bench.folder, device="scope", min_free_mb=0, verify=False),
        health=bench.health,
    )
    publisher.publish_info(info())
    publisher.publish_health(health_numbers(bench.health))
    publisher.start()
    heard = ears.wait_for(lambda messages: len(messages) == 104)
    assert publisher.stop(5) is True
    heard = ears.wait_for(lambda messages: states(messages)[-1:] == ["disconnected"])
    check_all(heard)
    assert [message.kind for message in heard[:4]] == ["state", "info", "health", "field"]
    assert frames(heard) == list(range(1, 101))
    assert [message.body["seq"] for message in heard if message.kind == "field"] == list(range(1, 101))
    assert states(heard)[0] == "init"
    assert "lost" not in states(heard)
    assert bench.outbox.depth() == 0
    assert bench.health.snapshot().outbox_depth == 0
    properties = heard[3].properties
    assert (properties.ContentType, properties.PayloadFormatIndicator) == ("application/json", 1)


class Wire:
    """A link whose broker answers the messages one by one, as often as it is looked at, and then falls silent."""

    window = 20
    is_closed = False
    max_packet_bytes = None

    def __init__(self, most_answers: int) -> None:
        self.sent: list[bytes] = []
        self._answered = 0
        self._most_answers = most_answers

    def packet_bytes(self, _topic: str, payload: bytes) -> int:
        return len(payload)

    def publish(self, _topic: str, payload: bytes) -> int:
        self.sent.append(payload)
        return len(self.sent)

    def turn(self, _longest_s: float, _wake_fd: int) -> list[Acknowledged]:
        if self._answered == min(self._most_answers, len(self.sent)):
            return []
        self._answered += 1
        return [Acknowledged(self._answered, 0, "Success")]


def make_window(bench: Bench, documents: Documents | None = None) -> Window:
    return Window(
        bench.outbox,
        documents or Documents(),
        TOPICS,
        delivery=DeliverySection(),
        limit=20,
        monotonic_ns=time.monotonic_ns,
        now=lambda: AT,
    )


def test_acknowledged_rows_leave_together_and_at_the_latest_when_the_broker_falls_silent(bench: Bench) -> None:
    bench.append(2 * STORE_TOGETHER)
    window = make_window(bench)
    wire: Any = Wire(most_answers=STORE_TOGETHER + 25)
    window.begin(wire)
    depths = []
    with contextlib.closing(Waker()) as waker:
        window.fill(wire)
        for _ in range(STORE_TOGETHER + 26):
            window.turn(wire, waker)
            window.fill(wire)
            depths.append(bench.outbox.depth())
    whole = 2 * STORE_TOGETHER
    assert depths == [whole] * (STORE_TOGETHER - 1) + [STORE_TOGETHER] * 26 + [STORE_TOGETHER - 25]


def test_the_last_acknowledged_rows_leave_at_once(bench: Bench) -> None:
    bench.append(3)
    window = make_window(bench)
    wire: Any = Wire(most_answers=3)
    window.begin(wire)
    window.fill(wire)
    with contextlib.closing(Waker()) as waker:
        for _ in range(3):
            window.turn(wire, waker)
            window.fill(wire)
    assert bench.outbox.depth() == 0


def test_the_next_rows_are_on_their_way_before_the_acknowledged_ones_are_stored(bench: Bench) -> None:
    bench.append(2 * STORE_TOGETHER)
    window = make_window(bench)
    wire: Any = Wire(most_answers=STORE_TOGETHER)
    window.begin(wire)
    sent_by_then = []
    bench.outbox.acknowledge = lambda row_ids: sent_by_then.append((len(wire.sent), len(row_ids)))  # type: ignore[method-assign]
    with contextlib.closing(Waker()) as waker:
        window.fill(wire)
        for _ in range(STORE_TOGETHER):
            window.turn(wire, waker)
            window.fill(wire)
    assert sent_by_then == [(STORE_TOGETHER + wire.window, STORE_TOGETHER)]


class Choosy:
    """A link whose broker answers each message at once, with the code that `answer` has for its topic."""

    window = 20
    is_closed = False
    max_packet_bytes = None

    def __init__(self, answer: Callable[[str], int]) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self._answer = answer
        self._answers: list[Acknowledged] = []

    def packet_bytes(self, _topic: str, payload: bytes, *, expiry_s: int | None = None) -> int:  # noqa: ARG002
        return len(payload)

    def publish(self, topic: str, payload: bytes, **_how: Any) -> int:
        self.sent.append((topic, payload))
        self._answers.append(Acknowledged(len(self.sent), self._answer(topic), "as told"))
        return len(self.sent)

    def turn(self, _longest_s: float, _wake_fd: int) -> list[Acknowledged]:
        answers, self._answers = self._answers, []
        return answers


def connect(window: Window, answer: Callable[[str], int], turns: int) -> Any:
    """The link, once the window has been served over it so many times."""
    link: Any = Choosy(answer)
    window.begin(link)
    serve(window, link, turns)
    return link


def serve(window: Window, link: Any, turns: int) -> None:
    with contextlib.closing(Waker()) as waker:
        for _ in range(turns):
            window.fill(link)
            window.turn(link, waker)


def test_what_is_tried_of_an_unheard_stream_does_not_have_all_that_waits_of_it_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backlog of gigabytes would keep the publisher from the network, and from the watchdog, at each try."""
    monkeypatch.setattr(window_module, "FIRST_HOLD_S", 0.0)
    bench.outbox.append([field_draft(n) for n in range(6 * FETCH_ROWS)])
    window = make_window(bench)
    link = connect(window, lambda _topic: NOBODY_SUBSCRIBED, 1)
    assert len(link.sent) == link.window
    read: list[int] = []
    pending = bench.outbox.pending
    monkeypatch.setattr(bench.outbox, "pending", lambda *how: read.append(len(rows := pending(*how))) or rows)
    serve(window, link, 1)
    assert len(link.sent) == link.window + 1
    assert sum(read) <= FETCH_ROWS


def test_when_the_row_that_was_tried_is_set_aside_the_others_of_its_stream_follow(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_module, "FIRST_HOLD_S", 0.0)
    bench.outbox.append([field_draft(n) for n in range(3 * FETCH_ROWS)])
    window = make_window(bench)
    codes = [NOBODY_SUBSCRIBED] * 20 + [NOT_AUTHORISED]
    connect(window, lambda topic: codes.pop(0) if codes and "/field/" in topic else 0, 30)
    assert bench.outbox.dead_letter_count() == 1
    assert bench.outbox.depth() == 0


def test_a_retained_word_that_is_refused_for_now_is_said_again_on_the_same_connection(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the state stays `lost`, and the word on a sample an old one, for as long as the connection holds."""
    monkeypatch.setattr(window_module, "PAUSE_S", 0.0)
    bench.outbox.append([], documents=[RetainedDocument(TOPICS.sample("s1"), {"n": 1})])
    bench.outbox.append([], documents=[RetainedDocument(TOPICS.sample("s0"), None)])
    documents = Documents()
    documents.put("state", TOPICS.state, {"state": "ready"})
    window = make_window(bench, documents)
    refused: list[str] = []

    def once(topic: str) -> int:
        is_first = topic not in refused
        refused.append(topic)
        return QUOTA_EXCEEDED if is_first else 0

    link = connect(window, once, 6)
    for topic in (TOPICS.state, TOPICS.sample("s1"), TOPICS.sample("s0")):
        assert len([sent for sent, _ in link.sent if sent == topic]) >= 2, topic
    assert window.are_documents_taken
    assert [document.topic for document in bench.outbox.documents()] == [TOPICS.sample("s1")]


def test_beside_a_retained_word_that_is_refused_again_and_again_the_others_are_said_once_and_rows_go_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_module, "PAUSE_S", 0.0)
    for sid in ("s0", "s1", "s2"):
        bench.outbox.append([], documents=[RetainedDocument(TOPICS.sample(sid), {"n": 1})])
    bench.append(3)
    window = make_window(bench)
    link = connect(window, lambda topic: QUOTA_EXCEEDED if topic == TOPICS.sample("s0") else 0, 6)
    topics = [topic for topic, _ in link.sent]
    assert topics.count(TOPICS.sample("s0")) == 6
    assert topics.count(TOPICS.sample("s1")) == topics.count(TOPICS.sample("s2")) == 1
    assert bench.outbox.depth() == 0


def test_a_retained_word_that_is_refused_waits_before_it_is_said_again_and_for_good_is_not_said_again(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.outbox.append([], documents=[RetainedDocument(TOPICS.sample("s1"), {"n": 1})])
    documents = Documents()
    documents.put("state", TOPICS.state, {"state": "ready"})
    window = make_window(bench, documents)
    codes = {TOPICS.state: QUOTA_EXCEEDED, TOPICS.sample("s1"): NOT_AUTHORISED}
    link = connect(window, codes.__getitem__, 10)
    assert len(link.sent) == 2
    monkeypatch.setattr(window_module, "PAUSE_S", 0.0)
    window.begin(link)
    serve(window, link, 10)
    topics = [topic for topic, _ in link.sent[2:]]
    assert topics.count(TOPICS.state) > 2
    assert topics.count(TOPICS.sample("s1")) == 1
    assert len([record for record in caplog.records if "refuses it" in record.message]) == 4


def test_a_late_subscriber_finds_state_info_and_health_retained(bench: Bench, mosquitto: Any, subscriber: Any) -> None:
    broker = mosquitto()
    publisher = bench.start(broker, health_interval_s=7)
    publisher.publish_info(info())
    publisher.publish_health(health_numbers(bench.health))
    publisher.publish_state(AgentState.READY)
    bench.append(1)
    publisher.wake()
    bench.wait_empty()
    heard = subscriber(broker).wait_for(lambda messages: len(messages) == 3)
    check_all(heard)
    assert {message.kind: message.is_retained for message in heard} == {"state": True, "info": True, "health": True}
    assert states(heard) == ["ready"]
    (health,) = (message for message in heard if message.kind == "health")
    assert 0 < health.properties.MessageExpiryInterval <= 21


def test_a_call_brings_a_row_out_within_50_ms(bench: Bench, mosquitto: Any, subscriber: Any) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/+/+/field/#")
    publisher = bench.start(broker)
    bench.wait_until(lambda: bench.health.snapshot().broker == "connected")
    waits_s = []
    for n in range(1, 16):
        time.sleep(0.03)
        bench.append(1)
        asked_s = time.monotonic()
        publisher.wake()
        heard = ears.wait_for(lambda messages, n=n: len(messages) >= n)
        waits_s.append(heard[-1].at_monotonic_s - asked_s)
    assert sorted(waits_s)[len(waits_s) // 2] < 0.05


def test_rows_that_nobody_calls_about_are_found_too(bench: Bench, mosquitto: Any) -> None:
    bench.start(mosquitto())
    bench.wait_until(lambda: bench.health.snapshot().broker == "connected")
    bench.append(3)
    bench.wait_empty(timeout_s=3)


def test_the_newest_state_wins_and_the_same_again_is_not_sent(bench: Bench, mosquitto: Any, subscriber: Any) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/+/+/state")
    publisher = bench.start(broker)
    for state in (AgentState.READY, AgentState.DEGRADED):
        publisher.publish_state(state)
        publisher.publish_state(state)
        ears.wait_for(lambda messages, state=state: states(messages)[-1:] == [state.value])
    publisher.stop(2)
    publisher.publish_state(AgentState.READY)  # a late word of another thread changes nothing any more
    ears.wait_for(lambda messages: states(messages)[-1:] == ["disconnected"])
    said = states(ears.messages)
    assert all(first != second for first, second in itertools.pairwise(said))


def test_a_broker_that_wants_fewer_at_a_time_gets_fewer(bench: Bench, mosquitto: Any, subscriber: Any) -> None:
    broker = mosquitto("max_inflight_messages 2")
    link = open_link(BrokerSection(port=broker.port), client_id="probe", protocol="5", will=Will(TOPICS.state, b"x"))
    assert link.window == 2
    link.disconnect()
    ears = subscriber(broker)
    bench.append(50)
    bench.start(broker).publish_info(info())
    bench.wait_empty()
    assert frames(ears.wait_for(lambda messages: len(frames(messages)) == 50)) == list(range(1, 51))


# ------------------------------------------------------------------------------------------------ the broker goes away


def test_it_starts_without_a_broker_and_delivers_when_there_is_one(
    bench: Bench, mosquitto: Any, subscriber: Any, caplog: pytest.LogCaptureFixture
) -> None:
    broker = mosquitto(start=False)
    caplog.set_level(logging.INFO, logger="agent.delivery")
    publisher = bench.start(broker)
    bench.append(60)
    publisher.publish_state(AgentState.READY)
    bench.wait_until(lambda: bench.health.snapshot().broker == "lost")
    mark = bench.health.snapshot()
    bench.wait_until(lambda: "publisher" not in bench.health.stalled_since(mark))  # the watchdog is fed meanwhile
    time.sleep(1.2)
    assert bench.health.snapshot().outbox_depth == 60
    broker.start()
    ears = subscriber(broker)
    bench.wait_empty()
    heard = ears.wait_for(lambda messages: "ready" in states(messages))
    check_all(heard)
    assert bench.health.snapshot().broker == "connected"
    lost = [record for record in caplog.records if "lost" in record.message]
    assert len(lost) == 1  # told once, though it was tried many times
    assert "trying on" in lost[0].message


def test_a_broker_killed_in_the_middle_misses_nothing(bench: Bench, mosquitto: Any, subscriber: Any) -> None:
    broker = mosquitto(ONLINE + "\npersistence true\npersistence_location {folder}/")
    ears = subscriber(broker)
    os.kill(broker.pid, signal.SIGUSR1)  # mosquitto stores the subscription, so that it outlives the kill
    bench.wait_until(lambda: (broker.folder / "mosquitto.db").exists())
    time.sleep(0.2)
    publisher = bench.start(broker)
    publisher.publish_info(info())
    killed_at = 0
    for _ in range(3):
        for step in range(60):
            bench.append(5)
            publisher.wake()
            if step == 30:
                # It is back after the kill before: what a broker holds for somebody who is away is lost with it too.
                ears.wait_for(lambda messages, after=killed_at: max(frames(messages), default=0) > after)
                broker.freeze()
                bench.append(10)
                publisher.wake()
                wait_until_all_is_heard_that_was_acknowledged(bench, ears)
                broker.kill()
                bench.append(10)
                killed_at = bench.fields
                broker.start()
    bench.wait_empty()
    heard = ears.wait_for(lambda messages: len(set(frames(messages))) == bench.fields)
    check_all(heard)
    assert without_repeats(frames(heard)) == list(range(1, bench.fields + 1))
    assert bench.outbox.dead_letter_count() == 0


def wait_until_all_is_heard_that_was_acknowledged(bench: Bench, ears: Any) -> None:
    """Of a broker that is frozen, and until nothing more is acknowledged.

    A kill takes with it what it had acknowledged and nobody has read yet: a subscriber whose acknowledgement meets a
    dead socket throws away what it has not read.
    """
    acknowledged: set[int] | None = None
    deadline_s = time.monotonic() + 30
    while True:
        before, acknowledged = acknowledged, set(range(1, bench.fields + 1)) - bench.waiting()
        unheard = acknowledged - set(frames(ears.messages))
        if acknowledged == before and not unheard:
            return
        assert time.monotonic() < deadline_s, f"left the outbox and did not come: {sorted(unheard)}"
        time.sleep(0.2)


def test_after_every_restart_state_info_and_health_are_said_again_before_any_row(
    bench: Bench, mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    publisher = bench.start(broker)
    publisher.publish_info(info())
    publisher.publish_health(health_numbers(bench.health))
    publisher.publish_state(AgentState.READY)
    bench.wait_until(lambda: bench.health.snapshot().broker == "connected")
    for _ in range(3):
        broker.kill()
        bench.append(2)
        broker.start()
        ears = subscriber(broker)
        heard = ears.wait_for(lambda messages: {"state", "info", "health"} <= {heard.kind for heard in messages})
        assert states(heard) == ["ready"]
        bench.wait_empty()
        ears.close()


def test_a_wire_cut_at_any_byte_loses_nothing_and_keeps_the_order(
    bench: Bench, mosquitto: Any, subscriber: Any, relay: Any
) -> None:
    broker = mosquitto(ONLINE)
    ears = subscriber(broker)
    wire = relay(broker)
    dice = random.Random(7)
    wire.cut_after_bytes = 3_000
    publisher = bench.start(wire, max_backoff_s=0.1)
    while wire.cuts < 12:
        bench.append(3)
        publisher.wake()
        wire.cut_after_bytes = dice.randrange(1_500, 40_000)
        time.sleep(0.02)
    wire.cut_after_bytes = None
    bench.wait_empty()
    heard = ears.wait_for(lambda messages: len(set(frames(messages))) == bench.fields)
    check_all(heard)
    assert without_repeats(frames(heard)) == list(range(1, bench.fields + 1))
    assert bench.outbox.dead_letter_count() == 0


def test_a_frozen_broker_is_noticed_by_the_keep_alive(bench: Bench, mosquitto: Any) -> None:
    broker = mosquitto()
    publisher = bench.start(broker)
    bench.wait_until(lambda: bench.health.snapshot().broker == "connected")
    broker.freeze()
    bench.append(30)
    publisher.wake()
    began_s = time.monotonic()
    bench.wait_until(lambda: bench.health.snapshot().broker == "lost", timeout_s=9)
    assert time.monotonic() - began_s < 2 * 2 + 2
    broker.thaw()
    bench.wait_empty()


def test_a_connection_that_is_cut_leaves_the_will_and_the_next_one_the_state(
    bench: Bench, mosquitto: Any, subscriber: Any, relay: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/+/+/state")
    wire = relay(broker)
    publisher = bench.start(wire)
    publisher.publish_state(AgentState.READY)
    ears.wait_for(lambda messages: states(messages)[-1:] == ["ready"])
    wire.cut()
    heard = ears.wait_for(lambda messages: states(messages)[-2:] == ["lost", "ready"])
    check_all(heard)
    assert [message.body["boot"] for message in heard] == [1] * len(heard)


PUBLISHING = """
import sys, time
from pathlib import Path
from agent.config import BrokerSection
from agent.delivery.outbox import begin_boot, open_outbox
from agent.delivery.publisher import Publisher
from agent.delivery.topics import Topics
from agent.domain import AgentState
from agent.health import Health
folder = Path(sys.argv[1])
publisher = Publisher(topics=Topics("lab", "scope"), broker=BrokerSection(port=int(sys.argv[2])),
    boot=begin_boot(folder), open_outbox=lambda: open_outbox(folder, device="scope", verify=False), health=Health())
publisher.publish_state(AgentState.READY)
publisher.start()
time.sleep(60)
"""


def test_an_agent_killed_with_sigkill_is_said_to_be_lost_and_that_is_retained(
    tmp_path: Path, mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/+/+/state")
    child = subprocess.Popen([sys.executable, "-c", PUBLISHING, str(tmp_path / "outbox"), str(broker.port)])
    try:
        ears.wait_for(lambda messages: states(messages)[-1:] == ["ready"])
    finally:
        child.kill()
        child.wait(timeout=10)
    ears.wait_for(lambda messages: states(messages)[-1:] == ["lost"])
    (retained,) = subscriber(broker, "hv/1/+/+/state").wait_for(lambda messages: len(messages) == 1)
    assert retained.is_retained
    assert retained.body["state"] == "lost"
    check_all([retained])


def test_a_restarted_agent_sends_what_the_last_one_left(bench: Bench, mosquitto: Any, subscriber: Any) -> None:
    broker = mosquitto(start=False)
    bench.append(5)
    bench.start(broker).stop(0.2)
    bench.boot = begin_boot(bench.folder)
    broker.start()
    ears = subscriber(broker)
    bench.start(broker)
    bench.wait_empty()
    heard = [
        message.body for message in ears.wait_for(lambda messages: len(frames(messages)) == 5) if "id" in message.body
    ]
    assert [body["id"] for body in heard] == [f"scope:1:{n}" for n in range(1, 6)]
    assert {body["historical"] for body in heard} == {True}  # of an older boot: always


def test_what_was_captured_over_a_minute_ago_says_so(bench: Bench, mosquitto: Any, subscriber: Any) -> None:
    broker = mosquitto()
    ears = subscriber(broker)
    now_ns = time.monotonic_ns()
    for n, age_s in ((1, 59), (2, 61), (3, 0)):
        draft = field_draft(n)
        bench.outbox.append(
            [Draft(draft.stream, draft.topic, draft.body, captured_monotonic_ns=now_ns - age_s * 10**9)]
        )
    bench.start(broker, monotonic_ns=lambda: now_ns)
    heard = ears.wait_for(lambda messages: len(frames(messages)) == 3)
    check_all(heard)
    assert [message.body["historical"] for message in heard if message.kind == "field"] == [False, True, False]


# ------------------------------------------------------------------------------------------------ the broker says no


def test_a_refused_password_is_told_once_and_mended_without_a_restart(
    bench: Bench,
    mosquitto: Any,
    mosquitto_password_file: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    known = mosquitto_password_file("scope", "right-secret")
    broker = mosquitto(f"allow_anonymous false\npassword_file {known}")
    secret = tmp_path / "password"
    secret.write_text("wrong-secret\n")
    secret.chmod(0o600)
    caplog.set_level(logging.DEBUG)
    bench.append(3)
    bench.start(broker, username="scope", password_file=secret, protocol="3.1.1")
    bench.wait_until(lambda: bench.health.snapshot().broker == "refused")
    time.sleep(1.5)
    assert bench.health.snapshot().broker == "refused"
    assert "broker.password_file" in bench.health.snapshot().broker_detail
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1
    assert bench.outbox.depth() == 3
    secret.write_text("right-secret\n")
    bench.wait_empty()
    assert bench.health.snapshot().broker == "connected"
    assert "secret" not in caplog.text


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_user_and_password_are_taken_from_file_or_environment(
    mosquitto: Any, mosquitto_password_file: Any, tmp_path: Path, protocol: str
) -> None:
    known = mosquitto_password_file("scope", "pass word")
    broker = mosquitto(f"allow_anonymous false\npassword_file {known}")
    secret = tmp_path / "password"
    secret.write_text("pass word\r\n")

    def attempt(password_file: Path | None, environ: dict[str, str], username: str | None = "scope") -> BrokerLink:
        section = BrokerSection(port=broker.port, username=username, password_file=password_file)
        will = Will(TOPICS.state, b"x")
        return open_link(section, client_id="probe", protocol=protocol, will=will, environ=environ)

    attempt(secret, {}).disconnect()
    attempt(None, {"HEMATOVISION_BROKER_PASSWORD": "pass word"}).disconnect()
    for environ, username in (({}, "scope"), ({"HEMATOVISION_BROKER_PASSWORD": "no"}, "scope"), ({}, None)):
        with pytest.raises(BrokerRefused, match=r"broker\.username"):
            attempt(None, environ, username)
    with pytest.raises(BrokerRefused, match=r"broker\.password_file .*cannot be read"):
        attempt(tmp_path / "nowhere", {})


def test_a_topic_that_is_not_allowed_ends_in_the_dead_letters_and_the_rest_goes_on(
    bench: Bench, mosquitto: Any, subscriber: Any, tmp_path: Path
) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite hv/1/lab/scope/event\ntopic readwrite hv/1/lab/scope/state\n")
    broker = mosquitto(f"acl_file {rules}")
    ears = subscriber(broker)
    bench.append(5)
    bench.outbox.append([event_draft("agent-started", "started", TOPICS, at=AT)])
    bench.start(broker, protocol="5")
    heard = ears.wait_for(lambda messages: sum(heard.kind == "event" for heard in messages) == 2)
    bench.wait_empty()
    letters = bench.outbox.dead_letters()
    assert [letter.seq for letter in letters] == [1, 2, 3, 4, 5]
    assert {letter.reason for letter in letters} == {"the broker refuses it: Not authorized (code 135)"}
    (told,) = (
        message.body for message in heard if message.kind == "event" and message.body["kind"] == "broker-rejected"
    )
    check_all(heard)
    assert told["detail"]["stream"] == "field"
    assert told["detail"]["message_id"] == "scope:1:1"


def test_a_refused_event_does_not_cause_another_event(bench: Bench, mosquitto: Any, tmp_path: Path) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite hv/1/lab/scope/state\n")
    bench.outbox.append([event_draft("agent-started", "started", TOPICS, at=AT)])
    bench.append(1)
    bench.start(mosquitto(f"acl_file {rules}"), protocol="5")
    bench.wait_empty()
    time.sleep(0.3)
    streams = [letter.stream for letter in bench.outbox.dead_letters()]
    assert streams == ["event", "field", "event"]  # the second event is the one about the field


@pytest.mark.parametrize("limit", ["max_packet_size 20000", "message_size_limit 20000"])
def test_a_message_too_large_for_the_broker_is_set_aside_and_the_next_ones_follow(
    bench: Bench, mosquitto: Any, subscriber: Any, limit: str
) -> None:
    broker = mosquitto(limit)
    ears = subscriber(broker)
    bench.append(3)
    bench.append(1, filler="x" * 30_000)
    bench.append(3)
    bench.start(broker, protocol="5")
    heard = ears.wait_for(lambda messages: 7 in frames(messages) and any(heard.kind == "event" for heard in messages))
    bench.wait_empty()
    check_all(heard)
    # With message_size_limit mosquitto answers in a way that MQTT does not know; then rows come more than once.
    assert without_repeats(frames(heard)) == [1, 2, 3, 5, 6, 7]
    (letter,) = bench.outbox.dead_letters()
    assert (letter.stream, letter.seq) == ("field", 4)
    assert ("too large" if limit.startswith("max_packet_size") else "connection breaks") in letter.reason
    (event,) = (message.body for message in heard if message.kind == "event")
    assert (event["kind"], event["severity"]) == ("broker-rejected", "error")
    assert event["detail"]["bytes"] > 30_000


def test_just_fitting_messages_are_not_set_aside(bench: Bench, mosquitto: Any, subscriber: Any) -> None:
    broker = mosquitto("max_packet_size 4000")
    ears = subscriber(broker)
    link = open_link(BrokerSection(port=broker.port), client_id="probe", protocol="5", will=Will(TOPICS.state, b"x"))
    assert link.max_packet_bytes == 4000
    short = len(json.dumps(field_draft(1, "x").body))
    for length in range(3950 - short, 4010 - short, 6):
        bench.append(1, filler="x" * length)
    link.disconnect()
    bench.start(broker, protocol="5")
    bench.wait_empty()
    letters = bench.outbox.dead_letters()
    heard = ears.wait_for(lambda messages: len(frames(messages)) + len(letters) == bench.fields)
    assert letters
    assert frames(heard)
    assert max(len(message.payload) for message in heard) < min(len(letter.payload) for letter in letters)


def test_on_3_1_1_a_message_over_which_the_broker_hangs_up_is_found_and_set_aside(
    bench: Bench, mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto("max_packet_size 20000")
    ears = subscriber(broker)
    bench.append(10)
    bench.append(1, filler="x" * 30_000)
    bench.append(10)
    bench.start(broker, protocol="3.1.1")
    heard = ears.wait_for(lambda messages: 21 in frames(messages) and any(heard.kind == "event" for heard in messages))
    bench.wait_empty()
    check_all(heard)
    assert without_repeats(frames(heard)) == [*range(1, 11), *range(12, 22)]
    (letter,) = bench.outbox.dead_letters()
    assert letter.seq == 11
    assert "connection breaks" in letter.reason


def test_a_broker_that_comes_and_goes_causes_no_dead_letters(
    bench: Bench, mosquitto: Any, subscriber: Any, relay: Any
) -> None:
    broker = mosquitto(ONLINE)
    ears = subscriber(broker)
    wire = relay(broker)
    wire.cut_after_bytes = 1_600  # enough for the documents and a part of the first row, and this ten times
    bench.append(3, filler="x" * 2_000)
    bench.start(wire, max_backoff_s=0.1)
    bench.wait_until(lambda: wire.cuts >= 4)
    wire.cut_after_bytes = None
    bench.wait_empty()
    assert bench.outbox.dead_letter_count() == 0
    assert without_repeats(frames(ears.wait_for(lambda messages: 3 in frames(messages)))) == [1, 2, 3]


def test_two_devices_of_one_name_are_told_apart_in_words(
    bench: Bench, mosquitto: Any, caplog: pytest.LogCaptureFixture
) -> None:
    broker = mosquitto()
    bench.start(broker, max_backoff_s=0.1)
    for _ in range(8):
        bench.wait_until(lambda: bench.health.snapshot().broker == "connected")
        section = BrokerSection(port=broker.port)
        other = open_link(section, client_id="hv-lab-scope", protocol="5", will=Will("other", b"x"))
        bench.wait_until(lambda: bench.health.snapshot().broker == "lost")
        detail = bench.health.snapshot().broker_detail
        other.abandon()
    assert "connect as hv-lab-scope too?" in detail
    assert caplog.text.count("broker lost") == 5  # then no more, until a connection holds


class Babbler:
    """A port that answers each connection with the next of some bytes and then hangs up."""

    host = "127.0.0.1"

    def __init__(self, *answers: bytes) -> None:
        self.connections = 0
        self._answers = itertools.cycle(answers)
        self._listener = socket.create_server((self.host, 0))
        self._listener.settimeout(0.05)
        self.port = self._listener.getsockname()[1]
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_closing:
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            with client:
                client.settimeout(1)
                client.recv(65536)
                client.sendall(next(self._answers))
                time.sleep(0.02)
            self.connections += 1

    def close(self) -> None:
        self._is_closing = True
        self._thread.join(timeout=5)
        self._listener.close()


@pytest.fixture
def babbler() -> Iterator[Callable[..., Babbler]]:
    babblers: list[Babbler] = []

    def make(*answers: bytes) -> Babbler:
        babblers.append(Babbler(*answers))
        return babblers[-1]

    yield make
    for one in babblers:
        one.close()


def test_a_broker_that_says_that_another_has_our_name_is_believed(bench: Bench, babbler: Any) -> None:
    connack, taken_over = b"\x20\x03\x00\x00\x00", b"\xe0\x06\x8e\x04\x1f\x00\x01x"
    bench.start(babbler(connack + taken_over), max_backoff_s=60)
    bench.wait_until(lambda: bench.health.snapshot().broker == "lost")
    assert "another client has connected as hv-lab-scope" in bench.health.snapshot().broker_detail


def test_a_port_that_does_not_speak_mqtt_breaks_nothing(bench: Bench, babbler: Any) -> None:
    http, garbage = b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x20\x7f" + b"\xff" * 127
    wire = babbler(http, garbage, b"\x20\x00", b"\x20\x02\x00\x63", b"\x20\x03\x00\x63\x00", b"\xf0\x00", b"\x40\x00")
    bench.append(1)
    publisher = bench.start(wire, max_backoff_s=0.1)
    bench.wait_until(lambda: wire.connections >= 16)
    assert publisher.is_alive()
    assert bench.health.snapshot().broker == "lost"
    assert bench.outbox.depth() == 1


# ------------------------------------------------------------------------------------------------------- the versions


def test_a_broker_that_hangs_up_on_version_5_without_a_word_is_tried_with_3_1_1(
    bench: Bench, mosquitto: Any, subscriber: Any, relay: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker)
    wire = relay(broker)
    wire.refuses = lambda first: first[0] == 0x10 and b"MQTT\x05" in first
    bench.append(3)
    bench.start(wire)
    bench.wait_empty()
    assert "MQTT 3.1.1" in bench.health.snapshot().broker_detail
    assert frames(ears.wait_for(lambda messages: len(frames(messages)) == 3)) == [1, 2, 3]


def test_a_broker_that_has_spoken_version_5_is_not_taken_for_an_old_one_when_it_goes_down(
    bench: Bench, mosquitto: Any, relay: Any
) -> None:
    wire = relay(mosquitto())
    bench.start(wire, max_backoff_s=0.1)
    bench.wait_until(lambda: "MQTT 5" in bench.health.snapshot().broker_detail)
    refused: list[bytes] = []
    wire.refuses = lambda first: b"hv-lab-scope" in first and refused.append(first) is None
    wire.cut()
    bench.wait_until(lambda: len(refused) > 2 * SILENT_ENDS)
    wire.refuses = lambda _first: False
    bench.wait_until(lambda: bench.health.snapshot().broker == "connected")
    assert "MQTT 5" in bench.health.snapshot().broker_detail
    assert all(b"MQTT\x05" in first for first in refused)


def test_a_broker_that_was_exchanged_for_an_old_one_is_found_and_the_next_connection_begins_with_version_5(
    bench: Bench, mosquitto: Any, relay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "SILENT_ENDS_OF_A_KNOWN_BROKER", 5)
    wire = relay(mosquitto())
    bench.start(wire, max_backoff_s=0.1)
    bench.wait_until(lambda: "MQTT 5" in bench.health.snapshot().broker_detail)
    wire.refuses = lambda first: b"MQTT\x05" in first
    wire.cut()
    bench.wait_until(lambda: "MQTT 3.1.1" in bench.health.snapshot().broker_detail)
    wire.refuses = lambda _first: False
    wire.cut()
    bench.wait_until(lambda: "MQTT 5" in bench.health.snapshot().broker_detail)


# ---------------------------------------------------------------------------------------------------------------- TLS


@pytest.fixture
def authority(tmp_path: Path) -> Callable[[str], tuple[Path, Path, Path]]:
    """Factory `(name) -> (authority, certificate, key)`, signed by an authority of the test's own."""
    ca, ca_key = tmp_path / "ca.pem", tmp_path / "ca.key"

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True)

    try:
        openssl("version")
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    openssl(*new, "-subj", "/CN=test authority", "-keyout", str(ca_key), "-out", str(ca))

    def make(name: str) -> tuple[Path, Path, Path]:
        key, request, certificate = (tmp_path / f"{name}.{ending}" for ending in ("key", "csr", "pem"))
        names = tmp_path / f"{name}.names"
        names.write_text("subjectAltName=IP:127.0.0.1\n")
        openssl(
            "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request)
        )
        openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(ca), "-CAkey", str(ca_key), "-CAcreateserial"),
            *("-days", "2", "-extfile", str(names), "-out", str(certificate)),
        )
        return ca, certificate, key

    return make


def test_tls_with_a_client_certificate(bench: Bench, mosquitto: Any, authority: Any, tmp_path: Path) -> None:
    ca, broker_certificate, broker_key = authority("broker")
    _, certificate, key = authority("scope")
    broker = mosquitto(
        "listener {port} 127.0.0.1\n"
        f"cafile {ca}\ncertfile {broker_certificate}\nkeyfile {broker_key}\nrequire_certificate true",
        listener=False,
    )
    good = {"enabled": True, "ca_file": ca, "certificate_file": certificate, "key_file": key}
    bench.append(200)
    bench.start(broker, tls=good, protocol="3.1.1")
    bench.wait_empty()

    def attempt(**tls: Any) -> BrokerLink:
        section = BrokerSection(port=broker.port, tls={**good, **tls})
        return open_link(section, client_id="probe", protocol="5", will=Will(TOPICS.state, b"x"))

    attempt().disconnect()
    with pytest.raises(BrokerRefused, match=r"broker\.tls\.ca_file"):
        attempt(ca_file=None)
    with pytest.raises(BrokerRefused, match=r"broker\.tls\.ca_file .*nowhere"):
        attempt(ca_file=tmp_path / "nowhere")
    with pytest.raises(BrokerRefused, match=r"broker\.tls\.certificate_file"):
        attempt(key_file=broker_key)
    with pytest.raises(BrokerUnavailable):
        attempt(certificate_file=None, key_file=None)
    with pytest.raises(BrokerUnavailable):
        attempt(enabled=False)


# ------------------------------------------------------------------------------------------------- the outbox is sick


class SickOutbox:
    """The real outbox, but for the calls that are told to fail."""

    def __init__(self, real: Outbox, fails: dict[str, int]) -> None:
        self._real = real
        self._fails = fails

    def __enter__(self) -> SickOutbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()

    def __getattr__(self, name: str) -> Any:
        if self._fails.get(name, 0) > 0:
            self._fails[name] -= 1
            raise OutboxError("the disk is full")
        return getattr(self._real, name)


@pytest.mark.parametrize("fails", ["acknowledge", "pending", "reject", "depth"])
def test_an_outbox_that_fails_for_a_while_stops_nothing_and_sends_nothing_twice(
    bench: Bench, mosquitto: Any, subscriber: Any, fails: str
) -> None:
    broker = mosquitto("max_packet_size 20000")
    ears = subscriber(broker)
    bench.append(30)
    bench.append(1, filler="x" * 30_000)
    bench.append(30)
    left = {fails: 2}
    bench.start(
        broker,
        open_outbox=lambda: SickOutbox(open_outbox(bench.folder, device="scope", min_free_mb=0, verify=False), left),
    )
    bench.wait_empty()
    assert left[fails] < 2
    assert frames(ears.wait_for(lambda messages: 61 in frames(messages))) == [*range(1, 31), *range(32, 62)]
    assert bench.outbox.dead_letter_count() == 1


def test_a_row_that_the_disk_has_changed_is_not_sent(bench: Bench, mosquitto: Any, subscriber: Any) -> None:
    broker = mosquitto()
    ears = subscriber(broker)
    bench.append(3)
    with contextlib.closing(sqlite3.connect(bench.outbox.path, isolation_level=None)) as disk:
        disk.execute("UPDATE rows SET payload = x'7b7d' WHERE seq = 2")
    bench.start(broker)
    heard = ears.wait_for(lambda messages: any(heard.kind == "event" for heard in messages))
    assert frames(heard) == [1, 3]
    (event,) = (message.body for message in heard if message.kind == "event")
    assert event["kind"] == "row-damaged"
    check_all(heard)


def test_a_damaged_outbox_ends_the_thread_and_says_why(
    bench: Bench, mosquitto: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench.append(3)
    bench.outbox.close()
    bench.outbox.path.write_bytes(b"rubbish" * 1000)
    publisher = bench.start(mosquitto())
    publisher.join(timeout=10)
    assert not publisher.is_alive()
    assert "the next start of the agent sets it aside" in str(publisher.failure)
    assert "the publisher has ended" in caplog.text
    bench.publisher = None
    bench.outbox = bench.open()
    assert bench.outbox.salvage is not None


# --------------------------------------------------------------------------------------------------------------- stop


def test_stop_sends_what_waits_and_says_goodbye(bench: Bench, mosquitto: Any, subscriber: Any) -> None:
    broker = mosquitto()
    ears = subscriber(broker)
    bench.append(500)
    publisher = bench.start(broker)
    assert publisher.stop(10) is True
    assert not publisher.is_alive()
    heard = ears.wait_for(lambda messages: states(messages)[-1:] == ["disconnected"])
    assert frames(heard) == list(range(1, 501))
    assert states(heard)[-2:] == ["stopping", "disconnected"]
    time.sleep(0.3)
    assert "lost" not in states(ears.messages)


def test_stop_does_not_wait_for_a_broker_that_is_not_there(bench: Bench, mosquitto: Any) -> None:
    bench.append(5)
    publisher = bench.start(mosquitto(start=False), max_backoff_s=60)
    bench.wait_until(lambda: bench.health.snapshot().broker == "lost")
    time.sleep(1)
    began_s = time.monotonic()
    assert publisher.stop(30) is False
    assert time.monotonic() - began_s < 3
    assert bench.outbox.depth() == 5


def test_stop_makes_one_last_attempt_at_a_broker_that_is_back(bench: Bench, mosquitto: Any) -> None:
    broker = mosquitto(start=False)
    bench.append(5)
    publisher = bench.start(broker, max_backoff_s=60, protocol="3.1.1", jitter=lambda: 1.0)
    bench.wait_until(lambda: bench.health.snapshot().broker == "lost")
    time.sleep(3)  # now it waits for long
    broker.start()
    assert publisher.stop(5) is True
    assert bench.outbox.depth() == 0


def test_stop_gives_up_a_frozen_broker_when_the_time_is_over(bench: Bench, mosquitto: Any) -> None:
    broker = mosquitto()
    publisher = bench.start(broker, keepalive_s=60)
    bench.wait_until(lambda: bench.health.snapshot().broker == "connected")
    broker.freeze()
    bench.append(50)
    began_s = time.monotonic()
    assert publisher.stop(1) is False
    assert time.monotonic() - began_s < 6
    broker.thaw()
    assert bench.outbox.depth() == 50


def test_rows_appended_just_before_the_stop_are_sent(bench: Bench, mosquitto: Any) -> None:
    broker = mosquitto()
    for _ in range(5):
        publisher = bench.start(broker)
        bench.wait_until(lambda: bench.health.snapshot().broker == "connected")
        bench.append(1)  # nobody calls
        assert publisher.stop(5) is True
        assert bench.outbox.depth() == 0


def test_with_an_empty_outbox_nothing_is_left_though_the_broker_is_away(bench: Bench, mosquitto: Any) -> None:
    assert bench.start(mosquitto(start=False)).stop(0.5) is True


def test_a_publisher_that_never_started_can_be_stopped(bench: Bench) -> None:
    publisher = Publisher(topics=TOPICS, broker=BrokerSection(), boot=1, open_outbox=bench.open, health=bench.health)
    publisher.wake()
    assert publisher.stop(1) is False


def test_the_pauses_double_up_to_the_limit_and_are_jittered() -> None:
    backoff = Backoff(4.0, jitter=lambda: 1.0)
    assert [backoff.next_s() for _ in range(7)] == [0.25, 0.5, 1, 2, 4, 4, 4]
    backoff.reset()
    assert backoff.next_s() == 0.25
    backoff.lengthen()
    assert backoff.next_s() == 4
    assert Backoff(4.0, jitter=lambda: 0.0).next_s() == 0.125
    assert Backoff(0.1, jitter=lambda: 1.0).next_s() == 0.1
