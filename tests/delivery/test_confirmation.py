"""What a receiver confirms and what nobody does: the words, sending again in time, and both at a real broker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import paho.mqtt.client as mqtt
import pytest

from agent.config import BrokerSection, DeliverySection
from agent.delivery.acks import Ack, read_ack
from agent.delivery.messages import Draft, load_schema
from agent.delivery.outbox import Outbox, Row, begin_boot, open_outbox
from agent.delivery.publisher import Publisher
from agent.delivery.topics import Topics
from agent.delivery.window import LONGEST_RESEND_S, Awaiting
from agent.health import Health

TOPICS = Topics("lab", "scope")


def make_draft(n: int, stream: str = "field") -> Draft:
    topic = TOPICS.event if stream == "event" else f"{TOPICS.base}/{stream}/s1"
    return Draft(stream, topic, {"schema": f"hv/1/{stream}", "n": n})


def make_outbox(folder: Path, **options: Any) -> Outbox:
    return open_outbox(folder, device="scope", min_free_mb=0, keep_mb=1, keep_hours=1, **options)


# --------------------------------------------------------------------------------------------- acknowledgements, said


def ack_body(**changed: Any) -> dict[str, Any]:
    body = {"schema": "hv/1/ack", "receiver": "central", "device": "scope", "stream": "field", "boot": 1, "seq": 7}
    return {**body, "at": "2026-11-25T08:00:00.000Z", "ruo": True, **changed}


def read(body: Any, is_retained: bool = False) -> Ack | str:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_ack(payload, receiver="central", device="scope", is_retained=is_retained)


def test_what_the_schema_of_acknowledgements_lets_through_is_read_and_what_it_refuses_is_not() -> None:
    is_valid = jsonschema.Draft202012Validator(load_schema("ack")).is_valid
    sound = [ack_body(), ack_body(stream="audit"), ack_body(boot=2**53, seq=2**53)]
    wrong: list[dict[str, Any]] = [
        {"schema": "hv/2/ack"},
        {"stream": "Field/#"},
        {"boot": 0},
        {"seq": 1.5},
        {"seq": "7"},
    ]
    assert all(is_valid(body) and isinstance(read(body), Ack) for body in sound)
    assert not any(is_valid(ack_body(**change)) or isinstance(read(ack_body(**change)), Ack) for change in wrong)


def test_an_acknowledgement_is_read_and_keys_of_a_newer_contract_are_passed_over() -> None:
    assert read(ack_body(newer="key")) == Ack("central", "field", 1, 7)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (ack_body(receiver="other"), "speaks for 'other'"),
        (ack_body(device="other"), "of 'other'"),
        (ack_body(schema="hv/2/ack"), "hv/1/ack"),
        (ack_body(seq=0), "seq"),
        (ack_body(seq=True), "seq"),
        (ack_body(seq="7"), "seq"),
        (ack_body(boot=1e300), "boot"),
        (ack_body(stream="field; drop"), "stream"),
        (b"\xff", "cannot be read"),
        (b"[" * 2000, "cannot be read"),
        (b"{" + b" " * 5000, "5001 bytes"),
    ],
)
def test_an_acknowledgement_that_is_not_plainly_one_is_not_believed(body: Any, reason: str) -> None:
    verdict = read(body)
    assert isinstance(verdict, str)
    assert reason in verdict


def test_a_retained_acknowledgement_is_not_believed() -> None:
    assert "retained" in str(read(ack_body(), is_retained=True))


# ---------------------------------------------------------------------------------------------------------- resending


def test_what_is_not_confirmed_is_due_again_later_and_later_until_somebody_confirms() -> None:
    first, second = (Row(n, "field", 1, n, TOPICS.field("s1"), 0, b"{}") for n in (1, 2))
    awaiting = Awaiting(60)
    awaiting.note(first, 0)
    awaiting.note(second, 30)
    assert not awaiting.take_due(59)
    assert awaiting.take_due(61)
    assert first.row_id not in awaiting
    assert second.row_id in awaiting
    awaiting.note(first, 61)
    assert not awaiting.take_due(120)  # doubled
    assert awaiting.take_due(30 + 121)
    awaiting.forget([second.row_id])
    awaiting.note(second, 200)
    assert awaiting.take_due(261)
    for _ in range(20):
        awaiting.note(first, 0)
        awaiting.take_due(1e9)
    awaiting.note(first, 0)
    assert not awaiting.take_due(LONGEST_RESEND_S - 1)
    assert awaiting.take_due(LONGEST_RESEND_S)


# ------------------------------------------------------------------------------------------------------- with a broker


class Bench:
    """A publisher at a real broker, and a receiver that says only what the test has it say."""

    def __init__(self, folder: Path, broker: Any, *, protocol: str = "auto", **delivery: Any) -> None:
        begin_boot(folder)
        self.folder = folder
        self.outbox = make_outbox(folder)
        self.health = Health()
        self.section = BrokerSection.model_validate({"port": broker.port, "max_backoff_s": 0.2, "protocol": protocol})
        self.delivery = DeliverySection.model_validate(delivery)
        self.publisher: Publisher
        self.start()

    def start(self) -> None:
        self.publisher = Publisher(
            topics=TOPICS,
            broker=self.section,
            boot=1,
            open_outbox=lambda: make_outbox(self.folder, verify=False),
            health=self.health,
            delivery=self.delivery,
        )
        self.publisher.start()

    def append(self, *drafts: Draft) -> None:
        self.outbox.append(drafts)
        self.publisher.wake()

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = 20) -> None:
        end_s = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < end_s, f"{self.outbox.depth()} rows wait, {self.health.snapshot()}"
            assert self.publisher.failure is None, self.publisher.failure
            time.sleep(0.01)

    def close(self) -> None:
        self.publisher.stop(0)
        self.outbox.close()


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(broker: Any, **options: Any) -> Bench:
        benches.append(Bench(tmp_path / "bench", broker, **options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


def acknowledge(broker: Any, seq: int, receiver: str = "central", **changed: Any) -> None:
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.connect(broker.host, broker.port)
    client.loop_start()
    body = ack_body(**{"seq": seq, "receiver": receiver, **changed})
    client.publish(TOPICS.ack(receiver), json.dumps(body), qos=1).wait_for_publish(5)
    client.disconnect()
    client.loop_stop()


def numbers(ears: Any) -> list[int]:
    return [json.loads(message.payload)["n"] for message in ears.messages if "/field/" in message.topic]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_with_confirm_receiver_a_row_stays_until_the_receiver_has_it_on_disk(
    make_bench: Callable[..., Bench], mosquitto: Any, subscriber: Any, protocol: str
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, f"{TOPICS.base}/field/#")
    bench = make_bench(broker, protocol=protocol, confirm="receiver")
    bench.append(*(make_draft(n) for n in (1, 2, 3)))
    ears.wait_for(lambda messages: len(messages) >= 3)
    time.sleep(0.3)
    assert bench.outbox.depth() == 3
    acknowledge(broker, 2)
    bench.wait_until(lambda: bench.outbox.depth() == 1)
    acknowledge(broker, 9)  # never sent
    acknowledge(broker, 3, receiver="stranger")
    time.sleep(0.3)
    assert bench.outbox.depth() == 1
    acknowledge(broker, 3)
    bench.wait_until(lambda: bench.outbox.depth() == 0)
    assert numbers(ears) == [1, 2, 3]


def test_what_is_not_confirmed_is_sent_again_after_its_time_and_not_at_each_connection(
    make_bench: Callable[..., Bench], mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto("max_inflight_messages 0\nmax_queued_messages 0")
    ears = subscriber(broker, f"{TOPICS.base}/field/#")
    bench = make_bench(broker, confirm="receiver", resend_s=4)
    bench.append(*(make_draft(n) for n in (1, 2, 3)))
    ears.wait_for(lambda messages: len(messages) >= 3)
    begun_s = time.monotonic()
    broker.restart()
    bench.append(make_draft(4))
    ears.wait_for(lambda messages: len(messages) >= 4)
    assert numbers(ears)[:4] == [1, 2, 3, 4]
    ears.wait_for(lambda messages: len(messages) >= 7, timeout_s=30)
    assert time.monotonic() - begun_s > 3
    assert sorted(numbers(ears)[4:7]) == [1, 2, 3]


def test_no_more_is_sent_ahead_of_the_receiver_than_allowed_and_a_missed_number_at_once(
    make_bench: Callable[..., Bench], mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, f"{TOPICS.base}/field/#")
    bench = make_bench(broker, confirm="receiver", unconfirmed=20)
    for n in range(1, 31):
        bench.append(make_draft(n))
    ears.wait_for(lambda messages: len(messages) >= 20)
    time.sleep(0.5)
    assert numbers(ears) == list(range(1, 21))
    bench.publisher.send_again("field", 7, 8)
    ears.wait_for(lambda messages: len(messages) >= 22)
    assert numbers(ears)[20:] == [7, 8]
    acknowledge(broker, 20)
    ears.wait_for(lambda messages: len(messages) >= 32)
    assert numbers(ears)[22:] == list(range(21, 31))


def test_what_a_person_has_sent_again_does_not_leave_by_a_word_about_later_numbers_before_it_was_sent(
    make_bench: Callable[..., Bench], mosquitto: Any, subscriber: Any
) -> None:
    """The receiver was told that the number is gone, and has passed it over."""
    broker = mosquitto()
    ears = subscriber(broker, f"{TOPICS.base}/field/#")
    bench = make_bench(broker, confirm="receiver", unconfirmed=20)
    bench.append(make_draft(1))
    ears.wait_for(lambda messages: len(messages) >= 1)
    bench.outbox.reject(bench.outbox.pending(0, 1)[0].row_id, "too large")
    bench.append(*(make_draft(n) for n in range(2, 102)))
    ears.wait_for(lambda messages: len(messages) >= 20)
    bench.outbox.requeue()
    acknowledge(broker, 20)
    ears.wait_for(lambda messages: len(messages) >= 39)
    assert 1 in [row.seq for row in bench.outbox.pending(0, 200)]
    for seq in (39, 58, 77, 96):
        ears.wait_for(lambda messages, seq=seq: len(messages) >= seq)
        acknowledge(broker, seq)
    ears.wait_for(lambda messages: len(messages) >= 102)
    acknowledge(broker, 101)
    bench.wait_until(lambda: bench.outbox.depth() == 0)
    assert sorted(numbers(ears)) == [1, *range(1, 102)]


def test_with_confirm_broker_what_nobody_subscribes_to_waits_and_holds_nothing_else_up(
    make_bench: Callable[..., Bench], mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    bench = make_bench(broker, protocol="5")
    bench.append(make_draft(1), make_draft(1, "event"), make_draft(2))
    bench.wait_until(lambda: "nobody subscribes to event, field" in bench.health.snapshot().broker_detail)
    assert bench.outbox.depth() == 3
    ears = subscriber(broker, f"{TOPICS.base}/field/#")
    ears.wait_for(lambda messages: len(messages) >= 2, timeout_s=40)
    bench.append(make_draft(3))
    bench.wait_until(lambda: bench.outbox.depth() == 1)
    ears.wait_for(lambda messages: len(messages) >= 3)  # the broker's word and the message race each other
    assert numbers(ears) == [1, 2, 3]
    late = subscriber(broker, TOPICS.event)
    late.wait_for(lambda messages: len(messages) >= 1, timeout_s=40)
    bench.wait_until(lambda: bench.outbox.depth() == 0)
    assert broker.log_text().count("PUBLISH from hv-lab-scope (d0, q1, r0") < 20


def test_what_is_asked_for_again_comes_as_historical(
    make_bench: Callable[..., Bench], mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, f"{TOPICS.base}/field/#")
    bench = make_bench(broker)
    bench.append(make_draft(1), make_draft(2))
    bench.wait_until(lambda: bench.outbox.depth() == 0)
    assert bench.outbox.request_replay("field", 1, 2).asked == 2
    bench.publisher.send_again("field", 1, 2)
    ears.wait_for(lambda messages: len(messages) >= 4)
    assert [json.loads(message.payload)["historical"] for message in ears.messages] == [False, False, True, True]
    assert numbers(ears) == [1, 2, 1, 2]
    bench.wait_until(lambda: bench.outbox.asked_again(0, 9) == [])
