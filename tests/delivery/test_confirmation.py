"""Who lets a row leave: the broker's word, or the receivers'; and what is kept to be sent again."""

from __future__ import annotations

import contextlib
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
from agent.delivery.messages import Draft, RetainedDocument, load_schema
from agent.delivery.outbox import Outbox, ReplayAnswer, begin_boot, open_outbox
from agent.delivery.publisher import Publisher
from agent.delivery.topics import Topics
from agent.delivery.window import LONGEST_RESEND_S, Awaiting
from agent.errors import MessageRejected, OutboxError
from agent.health import Health

TOPICS = Topics("lab", "scope")
KEPT = {"keep_mb": 1.0, "keep_hours": 1.0}


def make_draft(n: int, stream: str = "field") -> Draft:
    topic = TOPICS.event if stream == "event" else f"{TOPICS.base}/{stream}/s1"
    return Draft(stream, topic, {"schema": f"hv/1/{stream}", "n": n})


def make_outbox(folder: Path, **options: Any) -> Outbox:
    return open_outbox(folder, **{"device": "scope", "min_free_mb": 0, **KEPT, **options})


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    begin_boot(tmp_path)
    with make_outbox(tmp_path) as opened:
        yield opened


def fill(outbox: Outbox, count: int, stream: str = "field") -> None:
    for n in range(1, count + 1):
        outbox.append([make_draft(n, stream)])


def seqs(outbox: Outbox) -> list[int]:
    return [row.seq for row in outbox.pending(0, 100)]


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


# ------------------------------------------------------------------------------------------------ acknowledged, stored


def test_a_receivers_word_lets_all_rows_up_to_it_leave_and_no_others(outbox: Outbox) -> None:
    fill(outbox, 3)
    outbox.append([make_draft(1, "cell"), make_draft(4)])
    left = outbox.confirm("central", "field", 1, 2, ("central",))
    assert left == [1, 2]
    assert [(row.stream, row.seq) for row in outbox.pending(0, 9)] == [("field", 3), ("cell", 1), ("field", 4)]
    assert outbox.depth() == 3


def test_a_word_about_an_earlier_boot_says_nothing_of_rows_of_a_later_one(tmp_path: Path) -> None:
    for _ in range(2):
        begin_boot(tmp_path)
        with make_outbox(tmp_path) as outbox:
            fill(outbox, 2)
    with make_outbox(tmp_path) as outbox:
        outbox.confirm("central", "field", 1, 4, ("central",))
        assert seqs(outbox) == [3, 4]


@pytest.mark.parametrize(("boot", "seq", "stream"), [(1, 4, "field"), (2, 1, "field"), (1, 1, "audit")])
def test_a_word_about_numbers_that_were_never_given_does_nothing(
    outbox: Outbox, boot: int, seq: int, stream: str
) -> None:
    fill(outbox, 3)
    assert outbox.confirm("central", stream, boot, seq, ("central",)) is None
    assert outbox.depth() == 3


def test_of_several_receivers_a_row_waits_for_the_word_of_each_over_a_restart(tmp_path: Path) -> None:
    both = ("central", "lis")
    begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        fill(outbox, 4)
        assert outbox.confirm("central", "field", 1, 3, both) == []
        assert outbox.confirm("lis", "field", 1, 1, both) == [1]
    with make_outbox(tmp_path) as outbox:
        assert outbox.confirm("lis", "field", 1, 4, both) == [2, 3]
        assert outbox.confirm("central", "field", 1, 2, both) == []
        assert seqs(outbox) == [4]


# ------------------------------------------------------------------------------------------------------------ history


def test_what_was_confirmed_is_kept_and_sent_again_when_asked_for_once(outbox: Outbox) -> None:
    fill(outbox, 5)
    outbox.confirm("central", "field", 1, 4, ("central",))
    assert outbox.request_replay("field", 2, 9) == ReplayAnswer(3, 1, (), 6)
    again = outbox.asked_again(0, 9)
    assert [(row.seq, row.is_replay) for row in again] == [(2, True), (3, True), (4, True)]
    assert outbox.depth() == 1
    outbox.acknowledge([row.row_id for row in again])
    assert outbox.asked_again(0, 9) == []
    assert outbox.request_replay("field", 2, 2).asked == 1


def test_what_is_gone_is_answered_in_ranges(outbox: Outbox) -> None:
    fill(outbox, 6)
    outbox.reject(2, "refused")
    outbox.reject(3, "refused")
    outbox.reject(6, "refused")
    assert outbox.request_replay("field", 1, 6) == ReplayAnswer(0, 3, ((2, 3), (6, 6)))
    assert outbox.request_replay("audit", 3, 5) == ReplayAnswer(0, 0, (), 3)


def test_history_ends_with_its_time_and_its_room(tmp_path: Path) -> None:
    clock_ns = [1_000_000_000]
    begin_boot(tmp_path)
    with make_outbox(tmp_path, keep_mb=0.001, monotonic_ns=lambda: clock_ns[0]) as outbox:
        fill(outbox, 40)
        outbox.confirm("central", "field", 1, 40, ("central",))
        assert 0 < outbox.kept_bytes() <= 0.001 * 2**20
        assert outbox.request_replay("field", 40, 40).asked == 1
        outbox.acknowledge([row.row_id for row in outbox.asked_again(0, 9)])
        clock_ns[0] += 3601 * 10**9
        outbox.prune()
        assert outbox.kept_bytes() == 0
        assert outbox.request_replay("field", 1, 40).gone == ((1, 40),)


def test_a_step_of_the_clock_takes_no_history_that_is_young(tmp_path: Path) -> None:
    """A device without a clock of its own begins in the past, counts and delivers, and then is told the time."""
    times = {"ns": 60 * 10**9, "s": 1_000_000.0}
    clocks: dict[str, Any] = {"monotonic_ns": lambda: times["ns"], "unix_time": lambda: times["s"]}
    begin_boot(tmp_path)
    with make_outbox(tmp_path, **clocks) as outbox:
        fill(outbox, 3)
        outbox.confirm("central", "field", 1, 3, ("central",))
        times["s"] += 100 * 86_400
        outbox.prune()
        assert outbox.request_replay("field", 1, 3) == ReplayAnswer(3, 0, ())
        outbox.acknowledge([1, 2, 3])
    begin_boot(tmp_path)
    times["ns"] = 0
    with make_outbox(tmp_path, **clocks) as outbox:  # what an earlier boot has left is dated by the clock
        outbox.prune()
        assert outbox.request_replay("field", 1, 3).gone == ((1, 3),)


def test_without_history_what_is_confirmed_is_gone(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_outbox(tmp_path, keep_mb=0) as outbox:
        fill(outbox, 2)
        outbox.acknowledge([1])
        assert outbox.request_replay("field", 1, 2) == ReplayAnswer(0, 1, ((1, 1),))


def test_the_counters_agree_with_the_rows_whatever_happened(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        fill(outbox, 9)
        outbox.confirm("central", "field", 1, 5, ("central",))
        outbox.request_replay("field", 1, 3)
        outbox.reject(2, "refused")
        outbox.acknowledge([1, 3, 6, 99])
        told = (outbox.depth(), outbox.kept_bytes())
    with make_outbox(tmp_path) as outbox:  # opening counts anew
        assert (outbox.depth(), outbox.kept_bytes()) == told


# ------------------------------------------------------------------------------------------------------------ for room


def test_on_a_short_disk_what_is_worth_less_goes_before_anything_in_the_outbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_boot(tmp_path)
    pictures = [10, 10, 10]  # MB on the disk
    free_mb = 66
    monkeypatch.setattr("agent.delivery.outbox._disk_free_bytes", lambda _path: (free_mb + 30 - sum(pictures)) * 2**20)
    with make_outbox(tmp_path, min_free_mb=64) as outbox:
        outbox.spare(lambda: bool(pictures) and bool(pictures.pop()))
        outbox.append([Draft("cell", "t/cell", {"schema": "s"})])
        assert len(pictures) == 3
        free_mb = 50
        outbox.append([Draft("cell", "t/cell", {"schema": "s"})])
        assert (len(pictures), outbox.dropped()) == (1, {})
        free_mb = 30
        with pytest.raises(OutboxError, match="min_free_mb"):
            outbox.append([Draft("field", "t/field", {"schema": "s"})])
        assert (pictures, outbox.dropped()) == ([], {})  # what is not stored pushes nothing out


def test_for_room_go_history_then_cells_then_old_events_and_results_never(tmp_path: Path) -> None:
    big = "x" * 20_000
    begin_boot(tmp_path)
    with make_outbox(tmp_path, max_mb=2) as outbox:

        def put(stream: str) -> None:
            outbox.append([Draft(stream, f"t/{stream}", {"schema": "s", "text": big})])

        for stream in ("field", "cell", "audit", "differential"):
            for _ in range(4):
                put(stream)
        for _ in range(110):
            outbox.append([Draft("event", "t/event", {"schema": "s", "text": "x" * 3000})])
        outbox.confirm("central", "field", 1, 2, ("central",))
        seen: list[tuple[int, dict[str, int]]] = []
        with contextlib.suppress(OutboxError):
            while len(seen) < 1000:
                put("field")
                state = (outbox.kept_bytes(), outbox.dropped())
                if not seen or seen[-1] != state:
                    seen.append(state)
        with pytest.raises(OutboxError, match="full"):
            put("field")
        assert [kept > 0 for kept, _ in seen] == sorted((kept > 0 for kept, _ in seen), reverse=True)
        names = [tuple(dropped) for _, dropped in seen]
        assert names == sorted(names, key=len)
        assert seen[-1] == (0, {"cell": 4, "event": 10})
        streams = [row.stream for row in outbox.pending(0, 1000)]
        assert [streams.count(name) for name in ("audit", "differential", "event", "cell")] == [4, 4, 100, 0]
        numbers = [row.seq for row in outbox.pending(0, 1000) if row.stream == "field"]
        assert numbers == list(range(3, numbers[-1] + 1))


def test_what_the_broker_would_not_take_is_set_aside_before_it_enters_also_after_a_restart(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.note_packet_limit(1000)
    with make_outbox(tmp_path) as outbox:
        outbox.append([make_draft(1), make_large_draft(), make_draft(3)])
        assert [row.seq for row in outbox.pending(0, 100, without=["event"])] == [1, 3]
        assert outbox.depth() == 3  # and the event about it
        (letter,) = outbox.dead_letters()
        assert (letter.seq, "too large" in letter.reason, "1000" in letter.reason) == (2, True, True)
        outbox.note_packet_limit(None)
        outbox.requeue([letter.letter_id])
        assert [row.seq for row in outbox.pending(0, 100, without=["event"])] == [1, 3, 2]


def make_large_draft() -> Draft:
    return Draft("field", TOPICS.field("s1"), {"schema": "hv/1/field", "text": "x" * 1000})


def events(outbox: Outbox) -> list[Any]:
    return [json.loads(row.payload) for row in outbox.pending(0, 1000) if row.stream == "event"]


def test_an_event_tells_of_what_was_set_aside_at_entry_in_the_same_transaction(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.note_packet_limit(1000)
        outbox.append([make_large_draft()])
        (event,) = events(outbox)
        jsonschema.Draft202012Validator(load_schema("event")).validate(event)
        (letter,) = outbox.dead_letters()
        assert (event["kind"], event["severity"]) == ("broker-rejected", "error")
        assert event["detail"] == {
            "stream": "field",
            "message_id": "scope:1:1",
            "topic": TOPICS.field("s1"),
            "bytes": len(letter.payload),
            "reason": letter.reason,
            "set_aside": 1,
        }


def test_many_that_are_too_large_make_one_event_and_one_line_a_minute_with_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin_boot(tmp_path)
    now_ns = [10**12]
    with make_outbox(tmp_path, monotonic_ns=lambda: now_ns[0]) as outbox:
        outbox.note_packet_limit(1000)
        for _ in range(5):
            outbox.append([make_large_draft()])
        now_ns[0] += 60 * 10**9
        outbox.append([make_large_draft()])
        assert [event["detail"]["set_aside"] for event in events(outbox)] == [1, 5]
        words = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [line.split(", ")[1].split(":")[0] for line in words] == [
            f"{n} since the last word of it" for n in (1, 5)
        ]


def test_an_event_that_is_too_large_itself_makes_no_further_one(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.note_packet_limit(100)
        outbox.append([make_large_draft()])
        assert outbox.depth() == 0
        assert [letter.stream for letter in outbox.dead_letters()] == ["field", "event"]


def test_what_could_not_be_stored_is_told_of_when_it_is(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.note_packet_limit(1000)
        unsayable = RetainedDocument("t", {"number": float("nan")})
        with pytest.raises(MessageRejected):
            outbox.append([make_large_draft()], documents=[unsayable])
        outbox.append([make_large_draft()])
        assert [event["detail"]["set_aside"] for event in events(outbox)] == [1]


# ---------------------------------------------------------------------------------------------------------- resending


def test_what_is_not_confirmed_is_due_again_later_and_later_until_somebody_confirms(outbox: Outbox) -> None:
    fill(outbox, 2)
    first, second = outbox.pending(0, 2)
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
