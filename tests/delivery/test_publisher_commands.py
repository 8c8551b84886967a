"""What the publisher hears and what it says besides rows: commands, replies, alerts, retained documents."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.config import BrokerSection
from agent.delivery.asking import ask
from agent.delivery.commands import InboundCommand
from agent.delivery.messages import RetainedDocument
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.delivery.publisher import Publisher
from agent.delivery.reports import Alert
from agent.delivery.topics import Topics
from agent.errors import BrokerUnavailable
from agent.health import Health

TOPICS = Topics("lab", "scope")
AT = datetime(2026, 11, 25, 8, 0, tzinfo=timezone.utc)


class Bench:
    """A publisher that hands commands to `heard`; room: how many of them may wait."""

    def __init__(self, folder: Path, broker: Any, room: int = 8, protocol: str = "auto") -> None:
        begin_boot(folder)
        self.outbox = self.open(folder)
        self.heard: queue.Queue[InboundCommand] = queue.Queue(room)
        section = BrokerSection.model_validate({"port": broker.port, "max_backoff_s": 0.2, "protocol": protocol})
        self.publisher = Publisher(
            topics=TOPICS,
            broker=section,
            boot=1,
            open_outbox=lambda: self.open(folder),
            health=Health(),
            take_command=self.take,
        )
        self.publisher.start()

    @staticmethod
    def open(folder: Path) -> Outbox:
        return open_outbox(folder, device="scope", min_free_mb=0, verify=False)

    def take(self, command: InboundCommand) -> bool:
        try:
            self.heard.put_nowait(command)
        except queue.Full:
            return False
        return True

    def close(self) -> None:
        self.publisher.stop(0)
        self.outbox.close()


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(broker: Any, **options: Any) -> Bench:
        benches.append(Bench(tmp_path / f"bench-{len(benches)}", broker, **options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


def send(broker: Any, name: str, payload: bytes, *, retain: bool = False, properties: Properties | None = None) -> None:
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.connect(broker.host, broker.port)
    client.loop_start()
    sent = client.publish(f"{TOPICS.base}/cmd/{name}", payload, qos=1, retain=retain, properties=properties)
    sent.wait_for_publish(10)
    client.disconnect()
    client.loop_stop()


def wait_listening(ears: Any) -> None:
    """The agent subscribes right after it has connected; the state comes behind the subscription."""
    ears.wait_for(lambda messages: any(message.kind == "state" for message in messages))


@pytest.fixture
def listening(
    make_bench: Callable[..., Bench], mosquitto: Any, subscriber: Any
) -> Callable[..., tuple[Any, Any, Bench]]:
    """Broker, ears and a bench that hears commands. filters: of the ears, besides all that the device says."""

    def listen(*filters: str, **options: Any) -> tuple[Any, Any, Bench]:
        broker = mosquitto()
        ears = subscriber(broker, "hv/1/#", *filters)
        bench = make_bench(broker, **options)
        wait_listening(ears)
        return broker, ears, bench

    return listen


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_command_is_handed_on_as_it_came(listening: Any, protocol: str) -> None:
    broker, _, bench = listening(protocol=protocol)
    send(broker, "start", b"\xff any bytes")
    command = bench.heard.get(timeout=10)
    assert (command.name, command.payload, command.is_retained) == ("start", b"\xff any bytes", False)
    assert time.monotonic() - command.received_monotonic_s < 5


@pytest.mark.parametrize("topic", ["model.stage", "model/stage"])
def test_a_command_with_a_dot_is_heard_from_a_broker_that_makes_a_level_of_it(listening: Any, topic: str) -> None:
    broker, _, bench = listening()
    send(broker, topic, b"{}")
    assert bench.heard.get(timeout=10).name == "model.stage"
    assert bench.heard.empty()


def test_a_question_goes_to_a_broker_that_hangs_up_on_mqtt_5(mosquitto: Any, relay: Any) -> None:
    wire = relay(mosquitto())
    wire.refuses = lambda first: first[0] == 0x10 and b"MQTT\x05" in first
    with pytest.raises(BrokerUnavailable, match="has not answered within 1 s"):
        ask(BrokerSection(port=wire.port), TOPICS, "ping", {}, timeout_s=1)


def test_response_topic_correlation_and_expiry_of_mqtt_5_are_handed_on(listening: Any) -> None:
    broker, ears, bench = listening("desk/#")
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic = "desk/7/answers/x/y"
    properties.CorrelationData = b"\x00\x07"
    properties.MessageExpiryInterval = 30
    send(broker, "ping", b"{}", properties=properties)
    command = bench.heard.get(timeout=10)
    assert (command.response_topic, command.correlation) == ("desk/7/answers/x/y", b"\x00\x07")
    assert command.expires_in_s is not None
    assert 28 <= command.expires_in_s <= 30
    bench.publisher.publish_reply("desk/7/answers/x/y", {"n": 1}, command.correlation)
    messages = ears.wait_for(lambda messages: any(message.topic.startswith("desk") for message in messages))
    reply = messages[-1]
    assert reply.body == {"n": 1}
    assert (reply.properties.CorrelationData, reply.properties.ContentType) == (b"\x00\x07", "application/json")
    assert not reply.is_retained


def test_a_retained_command_is_seen_as_one(make_bench: Callable[..., Bench], mosquitto: Any) -> None:
    broker = mosquitto()
    send(broker, "stop", b"{}", retain=True)
    bench = make_bench(broker)
    assert bench.heard.get(timeout=10).is_retained


def test_commands_are_heard_again_after_the_broker_was_restarted(listening: Any) -> None:
    broker, ears, bench = listening()
    broker.kill()
    known = len(ears.messages)
    broker.restart()
    # New, or retained at the new broker: whichever of the two is back first.
    ears.wait_for(lambda messages: any(message.kind == "state" for message in messages[known:]))
    send(broker, "ping", b"{}")
    assert bench.heard.get(timeout=10).name == "ping"


def test_when_too_many_commands_wait_the_next_is_told_to_come_back(listening: Any) -> None:
    broker, ears, _ = listening(room=1)
    for _ in range(2):
        send(broker, "ping", b"{}")
    messages = ears.wait_for(lambda messages: any(message.kind == "reply" for message in messages))
    assert messages[-1].body["code"] == "busy"


def test_an_alert_is_retained_until_it_is_cleared(
    make_bench: Callable[..., Bench], mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    bench = make_bench(broker)
    bench.publisher.publish_alert("camera-lost", Alert("camera-lost", "error", "no picture for 5 s", AT))
    ears = subscriber(broker, "hv/1/+/+/alert/#")
    (raised,) = ears.wait_for(lambda messages: len(messages) == 1)
    assert raised.body["message"] == "no picture for 5 s"
    bench.publisher.publish_alert("camera-lost", None)
    ears.wait_for(lambda messages: messages[-1].payload == b"")
    late = subscriber(broker, "hv/1/#")
    wait_listening(late)
    assert late.of_kind("alert") == []


def test_a_broker_that_forgot_everything_is_told_all_stored_documents_again_and_clears_only_once(
    make_bench: Callable[..., Bench], mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    bench = make_bench(broker)
    for number in range(3):
        bench.outbox.append((), documents=[RetainedDocument(TOPICS.sample("s1"), {"n": number})])
    bench.outbox.append((), documents=[RetainedDocument(TOPICS.sample("s0"), None)])
    bench.publisher.wake()
    ears = subscriber(broker, "hv/1/+/+/sample/#")
    ears.wait_for(lambda messages: any(message.payload == b'{"n":2}' for message in messages))
    deadline_s = time.monotonic() + 10
    while len(bench.outbox.documents()) > 1 and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert [document.topic for document in bench.outbox.documents()] == [TOPICS.sample("s1")]
    broker.kill()  # it keeps nothing on disk here
    broker.restart()
    late = subscriber(broker, "hv/1/+/+/sample/#")
    (again,) = late.wait_for(lambda messages: len(messages) == 1)
    assert again.payload == b'{"n":2}'


def test_pictures_go_out_as_they_are_and_the_oldest_give_way(
    make_bench: Callable[..., Bench], mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto(start=False)
    bench = make_bench(broker)
    for number in range(20):
        bench.publisher.publish_picture(TOPICS.image("s1", f"s1-{number}"), bytes([number]) * 1_000_000)
    broker.start()
    ears = subscriber(broker, "hv/1/+/+/image/#")
    bench.publisher.publish_picture(TOPICS.image("s1", "s1-20"), b"\xff\xd8jpeg")
    messages = ears.wait_for(lambda messages: messages != [] and messages[-1].topic.endswith("/s1-20"))
    assert len(messages) <= 9
    assert messages[-1].payload == b"\xff\xd8jpeg"
    assert messages[-1].properties.ContentType == "image/jpeg"
