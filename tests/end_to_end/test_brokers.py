"""The same street to every broker: mosquitto speaks MQTT 5, nats-server and RabbitMQ 3.10 speak 3.1.1 only.

tests/run.sh tests/end_to_end/test_brokers.py -m ''        RabbitMQ too (apt install rabbitmq-server)
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from agent_process import START_S, Bench, wait_until
from ledger import Ledger

from agent.config import BrokerSection
from agent.delivery.messages import event_draft
from agent.delivery.outbox import begin_boot, open_outbox
from agent.delivery.publisher import Publisher
from agent.delivery.topics import Topics
from agent.health import Health

KEEPS_SESSIONS = "max_queued_messages 0\npersistence true\npersistence_location {folder}/\nautosave_interval 1\n"

ABSENT_FOR = 1500
"""Messages while the receiver is away: more than mosquitto keeps by default."""

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Meeting:
    """A running broker, and the MQTT version in which it is spoken to.

    keeps_order: also in what it kept for an absent receiver. nats-server mixes some around the 1024th, now and then.
    hands_on_all: also while a client's session ends. nats-server 2.15 then throws away, once in some thousand times,
        what has just come for others, the will of that client among it; what it retains is right (docs/brokers.md).
    """

    broker: Any
    protocol: int
    keeps_order: bool
    hands_on_all: bool

    @property
    def words(self) -> str:
        return "MQTT 5" if self.protocol == mqtt.MQTTv5 else "MQTT 3.1.1"


@pytest.fixture(params=["mosquitto", "nats", pytest.param("rabbitmq", marks=pytest.mark.brokers)])
def meeting(request: pytest.FixtureRequest) -> Meeting:
    make = request.getfixturevalue(request.param)
    if request.param == "mosquitto":
        return Meeting(make(KEEPS_SESSIONS), mqtt.MQTTv5, keeps_order=True, hands_on_all=True)
    is_nats = request.param == "nats"
    return Meeting(make(), mqtt.MQTTv311, keeps_order=not is_nats, hands_on_all=not is_nats)


def states(messages: list[Any]) -> list[str]:
    return [message.body["state"] for message in messages if message.kind == "state"]


def wait_for_last_state(state: str, ears: Any, meeting: Meeting, subscriber: Any) -> None:
    """Wait until who listens has heard it, where the broker promises that, and until who comes now learns it."""
    if meeting.hands_on_all:
        ears.wait_for(lambda heard: states(heard)[-1:] == [state], START_S)

    def is_learnt() -> bool:
        late = subscriber(meeting.broker, "hv/1/lab/scope/state", protocol=meeting.protocol)
        heard = late.wait_for(lambda heard: any(message.is_retained for message in heard), START_S)
        late.close()
        if states(heard)[-1:] == [state]:
            return True
        time.sleep(1)  # each look leaves a session at the broker
        return False

    wait_until(is_learnt, f"the retained state is {state}")


def has_fields(count: int) -> Callable[[list[Any]], bool]:
    """Whether so many fields are there with all of their cells, and the events of a start."""

    def has_all(messages: list[Any]) -> bool:
        ids = {kind: {m.body["id"] for m in messages if m.kind == kind} for kind in ("field", "cell", "event")}
        cells = {cell["cell_id"] for m in messages if m.kind == "field" for cell in m.body["cells"]}
        return len(ids["field"]) == count and len(ids["cell"]) == len(cells) and len(ids["event"]) >= 2

    return has_all


def test_every_field_arrives_late_subscribers_learn_the_state_and_a_dead_agent_is_lost(
    bench: Bench, make_fields: Callable[..., Path], meeting: Meeting, subscriber: Any
) -> None:
    ears = subscriber(meeting.broker, protocol=meeting.protocol)
    bench.use_broker(meeting.broker.port)
    bench.use_folder(make_fields(5), watch=True, settle_s=0)
    agent = bench.start()
    ears.wait_for(has_fields(5), START_S)
    ears.wait_for(lambda heard: states(heard)[-1:] == ["sleeping"], START_S)
    # By exact names: RabbitMQ 3.10 gives no retained message to a subscription with a wildcard.
    documents = {"state", "info", "health"}
    late = subscriber(
        meeting.broker, *(f"hv/1/lab/scope/{name}" for name in sorted(documents)), protocol=meeting.protocol
    )
    late.wait_for(lambda heard: {m.kind for m in heard if m.is_retained} == documents, START_S)
    assert states(late.messages) == ["sleeping"]
    agent.kill()
    wait_for_last_state("lost", ears, meeting, subscriber)
    Ledger(ears.messages).check_all(pictures=5)
    assert f"{meeting.broker.port}, {meeting.words}" in agent.log_text


def test_an_outage_in_the_middle_costs_nothing_and_repeats_are_told_by_their_id(
    bench: Bench, make_fields: Callable[..., Path], meeting: Meeting, subscriber: Any, tmp_path: Path
) -> None:
    fields = sorted(make_fields(8).iterdir())
    watched = tmp_path / "watched"
    watched.mkdir()
    ears = subscriber(meeting.broker, protocol=meeting.protocol)
    bench.use_broker(meeting.broker.port)
    bench.use_folder(watched, watch=True, settle_s=0)
    agent = bench.start()
    for path in fields[:4]:
        shutil.copy(path, watched)
    ears.wait_for(has_fields(4), START_S)
    wait_until(lambda: bench.waiting() == {}, "an empty outbox")
    meeting.broker.stop()
    for path in fields[4:]:
        shutil.copy(path, watched)
    wait_until(lambda: bench.finished() == 8, "counting goes on without a broker")
    assert bench.waiting()["field"] == 4
    meeting.broker.start()
    ears.wait_for(has_fields(8), START_S)
    wait_until(lambda: bench.waiting() == {}, "an empty outbox")
    assert agent.terminate() == 0, agent.log_text
    wait_for_last_state("disconnected", ears, meeting, subscriber)
    Ledger(ears.messages).check_all(pictures=8)


def test_what_came_while_a_receiver_was_away_is_all_there_after_an_orderly_restart_of_the_broker(
    meeting: Meeting, subscriber: Any, tmp_path: Path
) -> None:
    away = subscriber(meeting.broker, protocol=meeting.protocol)
    away.close()
    topics, folder = Topics("lab", "scope"), tmp_path / "outbox"
    boot = begin_boot(folder)
    with open_outbox(folder, device="scope", min_free_mb=0) as outbox:
        at = datetime.now(timezone.utc)
        for _ in range(ABSENT_FOR):
            outbox.append([event_draft("agent-started", "started", topics, at=at)])
        publisher = Publisher(
            topics=topics,
            broker=BrokerSection(port=meeting.broker.port),
            boot=boot,
            open_outbox=lambda: open_outbox(folder, device="scope", min_free_mb=0, verify=False),
            health=Health(),
        )
        publisher.start()
        wait_until(lambda: outbox.depth() == 0, "everything is acknowledged")
        assert publisher.stop(5)
    meeting.broker.restart()
    away.reconnect()

    def distinct(messages: list[Any]) -> list[int]:
        return list(dict.fromkeys(message.body["seq"] for message in messages if message.kind == "event"))

    heard = distinct(away.wait_for(lambda messages: len(distinct(messages)) == ABSENT_FOR, START_S))
    assert (heard if meeting.keeps_order else sorted(heard)) == list(range(1, ABSENT_FOR + 1))
