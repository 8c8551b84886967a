"""The publisher against nats-server, which speaks MQTT 3.1.1 only."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jsonschema
import paho.mqtt.client as mqtt
import pytest

from agent.config import BrokerSection
from agent.delivery.link import ProtocolRefused, Will, open_link
from agent.delivery.messages import event_draft, load_schema
from agent.delivery.outbox import begin_boot, open_outbox
from agent.delivery.publisher import Publisher
from agent.delivery.topics import Topics
from agent.domain import AgentState
from agent.health import Health

TOPICS = Topics("lab", "scope")

pytestmark = pytest.mark.usefixtures("no_thread_left")


def test_version_5_is_refused_in_words(nats: Any) -> None:
    section = BrokerSection(port=nats().port)
    with pytest.raises(ProtocolRefused, match=r"does not speak MQTT 5"):
        open_link(section, client_id="probe", protocol="5", will=Will(TOPICS.state, b"x"))
    open_link(section, client_id="probe", protocol="3.1.1", will=Will(TOPICS.state, b"x")).disconnect()


def test_auto_falls_back_remembers_and_delivers_over_a_kill(tmp_path: Path, nats: Any, subscriber: Any) -> None:
    broker = nats()
    ears = subscriber(broker, protocol=mqtt.MQTTv311)
    folder = tmp_path / "outbox"
    health = Health()
    boot = begin_boot(folder)
    with open_outbox(folder, device="scope", min_free_mb=0) as outbox:

        def append(count: int) -> None:
            for _ in range(count):
                at = datetime.now(timezone.utc)
                outbox.append([event_draft("agent-started", "started", TOPICS, at=at)])

        publisher = Publisher(
            topics=TOPICS,
            broker=BrokerSection(port=broker.port, max_backoff_s=0.3),
            boot=boot,
            open_outbox=lambda: open_outbox(folder, device="scope", min_free_mb=0, verify=False),
            health=health,
        )
        append(100)
        publisher.publish_state(AgentState.READY)
        publisher.start()
        try:
            ears.wait_for(lambda messages: sum(heard.kind == "event" for heard in messages) == 100)
            assert "MQTT 3.1.1" in health.snapshot().broker_detail
            refused = broker.log_text().count("unacceptable protocol version")
            assert refused == 1
            broker.kill()
            append(50)
            broker.start()
            heard = ears.wait_for(
                lambda messages: len({heard.body["seq"] for heard in messages if heard.kind == "event"}) == 150
            )
            deadline_s = time.monotonic() + 10
            while outbox.depth() and time.monotonic() < deadline_s:
                time.sleep(0.02)
            assert broker.log_text().count("unacceptable protocol version") == 1  # not asked a second time
            assert publisher.stop(5) is True
        finally:
            publisher.stop(0)
        assert outbox.depth() == 0
    heard = ears.wait_for(
        lambda messages: [heard.body["state"] for heard in messages if heard.kind == "state"][-1:] == ["disconnected"]
    )
    seqs = [message.body["seq"] for message in heard if message.kind == "event"]
    assert list(dict.fromkeys(seqs)) == list(range(1, 151))
    for message in heard:
        jsonschema.Draft202012Validator(load_schema(message.kind)).validate(message.body)
