"""The collector as a process, with a real broker and real databases."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from sqlalchemy import func, select

from agent.central import tables
from agent.central.collector import ack_message, replay_command, topic_filters
from agent.central.database import open_database
from agent.central.intake import Place
from agent.central.ledger import Ack, Question
from agent.central.numbers import Span
from agent.delivery.commands import Command, Gatekeeper, InboundCommand, read_command
from agent.delivery.messages import load_schema
from tests.central.collecting import ROOT, CollectorProcess, Wire, wait_until
from tests.central.conftest import NOW
from tests.central.fake_device import FakeDevice
from tests.central.postgresql import PostgreSql

Collect = Callable[..., CollectorProcess]


@pytest.fixture
def collect(tmp_path: Path) -> Iterator[Collect]:
    """Factory `collect(url, broker, name="collector", **settings)`: started; killed when the test ends."""
    started: list[CollectorProcess] = []

    def make(url: str, broker: Any, name: str = "collector", **settings: Any) -> CollectorProcess:
        collector = CollectorProcess(tmp_path, url, broker.port, name, **settings)
        before = subscriptions(broker)
        collector.start()
        started.append(collector)
        wait_until(lambda: subscriptions(broker) > before or "ERROR" in collector.log_text, "the collector listens", 90)
        return collector

    yield make
    for collector in started:
        collector.kill()


def subscriptions(broker: Any) -> int:
    """How often a collector has subscribed; mosquitto logs each filter as granted."""
    return len(re.findall(r": \S+ 1 hv/1/\+/\+/reply/replay", broker.log_text()))


def count(url: str, table: Any = tables.fields) -> int:
    engine = open_database(url)
    try:
        with engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(table)).scalar_one())
    finally:
        engine.dispose()


def acked(ears: Any, stream: str = "field") -> int:
    """The highest number that the collector has acknowledged."""
    return max((heard.body["seq"] for heard in ears.of_kind("ack") if heard.body["stream"] == stream), default=0)


def test_what_is_acknowledged_is_in_the_database(
    database_url: str, collect: Collect, mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/+/+/ack/#")
    collector = collect(database_url, broker)
    device, wire = FakeDevice(), Wire(broker.port)
    wire.send(device.fields(30))
    ears.wait_for(lambda _: acked(ears) == 30)
    assert count(database_url) == 30
    heard = ears.of_kind("ack")[-1]
    assert heard.topic == "hv/1/lab/scope/ack/central"
    assert {**heard.body, "at": ""} == {
        "schema": "hv/1/ack",
        "receiver": "central",
        "device": "scope",
        "stream": "field",
        "boot": 1,
        "seq": 30,
        "at": "",
        "ruo": True,
    }
    assert (heard.qos, heard.is_retained) == (1, False)
    validator = jsonschema.Draft202012Validator(load_schema("ack"))
    assert all(validator.is_valid(heard.body) for heard in ears.of_kind("ack"))
    wire.close()
    assert collector.terminate() == 0
    assert "Traceback" not in collector.log_text


def test_what_is_sent_while_the_collector_is_away_waits_at_the_broker(
    tmp_path: Path, collect: Collect, mosquitto: Any, subscriber: Any
) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    broker = mosquitto("max_queued_messages 0")
    ears = subscriber(broker, "hv/1/+/+/ack/#")
    collector = collect(url, broker)
    device, wire = FakeDevice(), Wire(broker.port)
    wire.send(device.fields(5))
    ears.wait_for(lambda _: acked(ears) == 5)
    assert collector.terminate() == 0
    wire.send(device.fields(300))
    assert count(url) == 5
    collector.start()
    ears.wait_for(lambda _: acked(ears) == 305)
    assert count(url) == 305


def test_a_collector_that_starts_tells_what_it_has(
    tmp_path: Path, collect: Collect, mosquitto: Any, subscriber: Any
) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    broker = mosquitto()
    collector = collect(url, broker)
    device, wire = FakeDevice(), Wire(broker.port)
    wire.send([*device.fields(3), device.event()])
    wait_until(lambda: count(url) == 3 and count(url, tables.events) == 1, "stored")
    collector.terminate()
    ears = subscriber(broker, "hv/1/+/+/ack/#")
    collector.start()
    ears.wait_for(lambda _: (acked(ears), acked(ears, "event")) == (3, 1))


def test_while_the_database_is_away_nothing_is_acknowledged_and_nothing_is_lost(
    postgresql: PostgreSql, collect: Collect, mosquitto: Any, subscriber: Any
) -> None:
    url = postgresql.new_database()
    broker = mosquitto("max_queued_messages 0")
    ears = subscriber(broker, "hv/1/+/+/ack/#")
    collector = collect(url, broker)
    device, wire = FakeDevice(), Wire(broker.port)
    wire.send(device.fields(5))
    ears.wait_for(lambda _: acked(ears) == 5)
    postgresql.kill()
    try:
        wire.send(device.fields(40))
        wait_until(lambda: "nothing is acknowledged: database postgresql://" in collector.log_text, "it says so")
        assert acked(ears) == 5
    finally:
        postgresql.start()
    ears.wait_for(lambda _: acked(ears) == 45)
    assert count(url) == 45
    assert collector.log_text.count("nothing is acknowledged") == 1
    assert collector.terminate() == 0


def test_a_collector_waits_for_a_database_that_is_not_up_yet(
    postgresql: PostgreSql, collect: Collect, mosquitto: Any
) -> None:
    url = postgresql.new_database()
    broker = mosquitto()
    postgresql.kill()
    try:
        collector = collect(url, broker)
        wait_until(lambda: "waiting for the database" in collector.log_text, "it says so")
    finally:
        postgresql.start()
    wait_until(lambda: subscriptions(broker) == 1, "it has gone on to the broker")
    assert collector.terminate() == 0


def test_a_killed_broker_is_found_again(tmp_path: Path, collect: Collect, mosquitto: Any) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    broker = mosquitto()
    collector = collect(url, broker)
    device, wire = FakeDevice(), Wire(broker.port)
    wire.send(device.fields(2))
    wait_until(lambda: count(url) == 2, "stored")
    broker.kill()
    wait_until(lambda: "connection to the broker lost" in collector.log_text, "it says so")
    broker.start()
    wait_until(lambda: subscriptions(broker) == 2, "it is back")
    Wire(broker.port).send(device.fields(2))
    wait_until(lambda: count(url) == 4, "stored")


def test_a_bad_message_is_set_aside_and_what_follows_is_stored(
    database_url: str, collect: Collect, mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/+/+/ack/#")
    collect(database_url, broker)
    device, wire = FakeDevice(), Wire(broker.port)
    one, two = device.fields(2)
    wire.send([one, ("hv/1/lab/scope/event", b"\x00\xff"), ("hv/1/lab/scope/field/s-1", b""), two])
    ears.wait_for(lambda _: acked(ears) == 2)
    assert count(database_url, tables.dead_letters) == 2


def test_a_missing_number_is_asked_for_and_then_acknowledged(
    tmp_path: Path, collect: Collect, mosquitto: Any, subscriber: Any
) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/+/+/ack/#", "hv/1/+/+/cmd/#")
    collect(url, broker)
    device, wire = FakeDevice(), Wire(broker.port)
    one, two, three, four, five = device.fields(5)
    wire.send([one, five])
    ears.wait_for(lambda _: bool(ears.of_kind("cmd")))
    (asked,) = ears.of_kind("cmd")
    assert asked.topic == "hv/1/lab/scope/cmd/replay"
    assert not asked.is_retained
    assert (asked.body["stream"], asked.body["from_seq"], asked.body["to_seq"]) == ("field", 2, 4)
    assert acked(ears) == 1
    # The device still has 3 and 4.
    answer = {"status": "ok", "transaction": asked.body["transaction"], "data": {"gone": [[2, 2]]}}
    wire.send([(device.topics.reply("replay"), json.dumps(answer).encode()), three, four])
    ears.wait_for(lambda _: acked(ears) == 5)
    assert two.seq == 2


def test_retained_words_of_devices_are_known_without_waiting(tmp_path: Path, collect: Collect, mosquitto: Any) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    broker = mosquitto()
    Wire(broker.port).send([FakeDevice().state()], retain=True)
    collect(url, broker)
    wait_until(lambda: count(url, tables.devices) == 1, "the device is known")


def test_a_group_divides_the_messages_and_writes_one_ledger(
    postgresql: PostgreSql, collect: Collect, mosquitto: Any, subscriber: Any
) -> None:
    url = postgresql.new_database()
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/+/+/ack/#")
    names = ("one", "two")
    both = [collect(url, broker, name, share="group", client_id=f"hv-collect-{name}") for name in names]
    device, wire = FakeDevice(), Wire(broker.port)
    wire.send(device.fields(100))
    ears.wait_for(lambda _: acked(ears) == 100)
    assert count(url) == 100
    for name in names:
        sent = [line for line in broker.log_text().splitlines() if f"Sending PUBLISH to hv-collect-{name}" in line]
        assert 20 < len([line for line in sent if "/field/" in line]) < 80
    assert [collector.terminate() for collector in both] == [0, 0]


def test_a_broker_of_mqtt_3_is_served_too(tmp_path: Path, nats: Any, subscriber: Any) -> None:
    import paho.mqtt.client as mqtt

    url = f"sqlite:///{tmp_path}/c.db"
    broker = nats()
    ears = subscriber(broker, "hv/1/+/+/ack/#", protocol=mqtt.MQTTv311)
    collector = CollectorProcess(tmp_path, url, broker.port)
    collector.start()
    device, wire = FakeDevice(), Wire(broker.port)
    try:
        wait_until(lambda: "INFO agent.central.collector: collecting\n" in collector.log_text, "it listens")
        wire.send(device.fields(10))
        ears.wait_for(lambda _: acked(ears) == 10)
        collector.kill()
        wire.send(device.fields(10))
        collector.start()
        ears.wait_for(lambda _: acked(ears) == 20)
        assert count(url) == 20
    finally:
        collector.kill()


def test_two_collectors_of_one_name_are_told_apart_in_words(tmp_path: Path, collect: Collect, mosquitto: Any) -> None:
    broker = mosquitto()
    first = collect(f"sqlite:///{tmp_path}/1.db", broker, "first")
    collect(f"sqlite:///{tmp_path}/2.db", broker, "second")
    wait_until(lambda: "does another program use the client_id hv-collect-central?" in first.log_text, "it says so")


def test_a_collector_that_is_not_let_in_says_so_and_goes_on_trying(
    tmp_path: Path, collect: Collect, mosquitto: Any, mosquitto_password_file: Any
) -> None:
    broker = mosquitto(f"allow_anonymous false\npassword_file {mosquitto_password_file('a', 'b')}")
    collector = collect(f"sqlite:///{tmp_path}/1.db", broker)
    wait_until(lambda: "refuses us" in collector.log_text, "it says so")
    assert collector.is_running
    assert collector.terminate() == 0


def test_the_request_for_a_replay_is_one_that_devices_understand() -> None:
    topic, body = replay_command(Question(Place("lab", "scope"), "field", Span(3, 7), "gap-12-1"))
    inbound = InboundCommand(topic.rsplit("/", 1)[1], json.dumps(body).encode())
    command = read_command(inbound, Gatekeeper("hv/1/lab/scope"), monotonic_s=0.0, now=NOW)
    assert isinstance(command, Command)
    assert command.transaction == "gap-12-1"


def test_topics_of_a_group_share_the_streams_and_not_the_documents() -> None:
    filters = topic_filters("lab", "group")
    assert "$share/group/hv/1/lab/+/field/+" in filters
    assert "hv/1/lab/+/state" in filters
    assert topic_filters(None, None)[0] == "hv/1/+/+/field/+"
    assert ack_message(Ack(Place("lab", "scope"), "field", 1, 2), "central", NOW)[0] == "hv/1/lab/scope/ack/central"


def hematovision(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agent", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--database", "what"), "this is no address of a database"),
        (("--database", "postgresql://a:b@c/d"), "holds a password"),
        (("--broker", "http://x"), "allowed: host, host:port, mqtt://host or mqtts://host"),
        (("--receiver", "Central!"), "1 to 63 of a-z, 0-9 and hyphen"),
        (("--share", "g"), "set client_id"),
        ((), "database.url: missing"),
    ],
)
def test_wrong_words_end_with_a_sentence(arguments: tuple[str, ...], words: str) -> None:
    done = hematovision("collect", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_its_extra_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['sqlalchemy'] = None; from agent.cli import main; main(['collect'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'hematovision-agent[central]'" in done.stderr


def test_the_template_is_the_committed_file() -> None:
    assert hematovision("collect", "--template").stdout == (ROOT / "deploy/central/collector.yaml").read_text()


def test_it_conforms_to_the_contract_of_receivers(tmp_path: Path, collect: Collect, mosquitto: Any) -> None:
    broker = mosquitto()
    collect(f"sqlite:///{tmp_path}/c.db", broker)
    address = ("--broker", f"127.0.0.1:{broker.port}", "--device", "lab/kit", "--receiver", "central")
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance", *address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
