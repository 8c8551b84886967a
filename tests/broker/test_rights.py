"""A real mosquitto on the files that make-site.sh made: who may do what, who is refused and in which words."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from site_at_broker import NOT_AUTHORISED, Person, Site

from agent.config import BrokerSection, loads
from agent.delivery.link import BrokerLink, Will, open_link
from agent.delivery.messages import event_draft
from agent.delivery.outbox import begin_boot, open_outbox
from agent.delivery.publisher import Publisher
from agent.delivery.topics import Topics
from agent.errors import BrokerRefused, BrokerUnavailable
from agent.health import Health
from agent.preflight import run_checks
from deploy.broker.make_site import Client, issue, make_site, open_authority

SUCCESS = (0x00, 0x10)
"""Taken; taken, and nobody subscribed."""

ONE, TWO = "hv/1/lab/microscope-1", "hv/1/lab/microscope-2"

Meet = Callable[..., Person]

pytestmark = pytest.mark.usefixtures("no_thread_left")


def attempt(port: int, **tls: Any) -> BrokerLink:
    section = BrokerSection(port=port, tls={"enabled": True, **tls})
    return open_link(section, client_id="probe", protocol="5", will=Will(f"{ONE}/state", b"{}"))


def test_the_agent_publishes_with_its_certificate_and_the_collector_hears_it(
    site: Site, broker: Any, person: Meet, tmp_path: Path
) -> None:
    collector = person("receiver", "collector")
    collector.subscribe("hv/1/lab/#")
    folder, topics = tmp_path / "outbox", Topics("lab", "microscope-1")
    boot = begin_boot(folder)
    with open_outbox(folder, device="microscope-1", min_free_mb=0) as outbox:
        for _ in range(20):
            outbox.append([event_draft("agent-started", "started", topics, at=datetime.now(timezone.utc))])
        publisher = Publisher(
            topics=topics,
            broker=BrokerSection(port=broker.port, tls=site.tls("device", "microscope-1")),
            boot=boot,
            open_outbox=lambda: open_outbox(folder, device="microscope-1", min_free_mb=0, verify=False),
            health=Health(),
        )
        publisher.start()
        heard = collector.wait_for(21)
        assert publisher.stop(5)
        assert outbox.dead_letter_count() == 0
    assert [topic for topic, _ in heard].count(f"{ONE}/event") == 20
    assert "p5, c1, k8, u'microscope-1'" in broker.log_text(), "the certificate's name is the user"


PARTS = (
    *("state", "info", "health", "event", "audit", "sample/s1", "field/s1", "cell/s1", "differential/s1"),
    *("image/s1/s1-7", "alert/disk-low", "reply/ping", "reply/anna/7"),
)


def test_a_device_says_everything_of_the_contract_below_its_own_topic_and_nothing_below_another(
    person: Meet,
) -> None:
    device = person("device", "microscope-1")
    assert set(device.codes(*(f"{ONE}/{part}" for part in PARTS)).values()) <= set(SUCCESS)
    foreign = (f"{TWO}/state", f"{TWO}/field/s1", "hv/1/other/microscope-1/field/s1", "anything")
    assert set(device.codes(*foreign).values()) == {NOT_AUTHORISED}


def test_a_device_cannot_send_a_command_or_an_acknowledgement_not_even_to_itself(person: Meet) -> None:
    device = person("device", "microscope-1")
    codes = device.codes(*(f"{base}/{what}" for base in (ONE, TWO) for what in ("cmd/start", "ack/collector")))
    assert set(codes.values()) == {NOT_AUTHORISED}


def test_a_device_hears_its_own_commands_and_acknowledgements_and_nothing_else_whatever_it_subscribes_to(
    person: Meet,
) -> None:
    """Mosquitto takes the subscription to everything; the rights are applied to what would be handed out."""
    device, other = person("device", "microscope-1"), person("device", "microscope-2")
    collector, anna = person("receiver", "collector"), person("operator", "anna")
    device.subscribe("#")
    other.publish(f"{TWO}/field/s1")
    anna.publish(f"{TWO}/cmd/start")
    collector.publish(f"{ONE}/ack/collector")
    anna.publish(f"{ONE}/cmd/start")
    assert [topic for topic, _ in device.wait_for(2)] == [f"{ONE}/ack/collector", f"{ONE}/cmd/start"]
    time.sleep(0.2)
    assert len(device.hears) == 2


def test_only_operators_send_commands_and_the_collector_may_ask_for_what_it_missed(person: Meet) -> None:
    collector, anna = person("receiver", "collector"), person("operator", "anna")
    names = ("start", "reload", "model.activate", "replay")
    topics = [*(f"{ONE}/cmd/{name}" for name in names), f"{ONE}/ack/collector", f"{ONE}/ack/anna", f"{ONE}/field/s1"]
    topics += [f"{ONE}/fleet/collector", f"{ONE}/fleet/anna", f"{ONE}/alert/drift"]

    def may(somebody: Person) -> set[str]:
        return {topic for topic, code in somebody.codes(*topics).items() if code in SUCCESS}

    assert may(anna) == {f"{ONE}/cmd/{name}" for name in names}
    assert may(collector) == {f"{ONE}/cmd/replay", f"{ONE}/ack/collector", f"{ONE}/fleet/collector"}


def test_the_collector_and_operators_read_everything_of_the_site(person: Meet) -> None:
    collector, anna = person("receiver", "collector"), person("operator", "anna")
    for somebody in (collector, anna):
        somebody.subscribe("hv/1/lab/#")
    person("device", "microscope-2").publish(f"{TWO}/field/s1")
    for somebody in (collector, anna):
        assert somebody.wait_for(1) == [(f"{TWO}/field/s1", b"x")]


def test_with_mqtt_3_1_1_a_refusal_looks_like_success_and_nothing_arrives(person: Meet) -> None:
    """Why the contract says: MQTT 5 where you can."""
    collector = person("receiver", "collector")
    collector.subscribe("hv/1/lab/#")
    device = person("device", "microscope-1", mqtt.MQTTv311)
    assert device.publish(f"{TWO}/field/s1") == 0
    device.publish(f"{ONE}/field/s1")
    assert [topic for topic, _ in collector.wait_for(1)] == [f"{ONE}/field/s1"]


# --------------------------------------------------------------------------------------------- who does not come in


def test_who_has_no_certificate_or_one_of_elsewhere_is_refused_in_words(
    site: Site, broker: Any, tmp_path: Path
) -> None:
    ca_file = site.top / "ca" / "ca.pem"
    attempt(broker.port, **site.tls("device", "microscope-1")).disconnect()
    with pytest.raises(BrokerRefused, match=r"asks for a certificate; set broker\.tls\.certificate_file"):
        attempt(broker.port, ca_file=ca_file)
    stranger = Site(tmp_path / "elsewhere" / "site").tls("device", "microscope-1")
    with pytest.raises(BrokerRefused, match="does not know the authority of our certificate"):
        attempt(broker.port, **{**stranger, "ca_file": ca_file})
    with pytest.raises(BrokerRefused, match=r"broker\.tls\.ca_file must hold the authority that signed it"):
        attempt(broker.port, **stranger)
    server = {"certificate_file": site.top / "broker/broker.pem", "key_file": site.top / "broker/broker.key"}
    with pytest.raises(BrokerRefused, match="is not one for a client"):
        attempt(broker.port, ca_file=ca_file, **server)
    with pytest.raises(BrokerUnavailable, match="without an answer; does it ask for TLS"):
        open_link(BrokerSection(port=broker.port), client_id="probe", protocol="5", will=Will("x", b""))


def test_a_certificate_that_has_expired_is_refused_in_words(site: Site, broker: Any) -> None:
    now = datetime.now(timezone.utc)
    authority, key = open_authority(site.top, now)
    pair = Client("device", "microscope-1").pair(site.top)
    issue(pair, authority, key, "microscope-1", now - timedelta(days=3), 2)
    with pytest.raises(BrokerRefused, match=r"our certificate has expired; renew broker\.tls\.certificate_file"):
        attempt(broker.port, **site.tls("device", "microscope-1"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"now": datetime.now(timezone.utc) - timedelta(days=3), "days": 2}, "has expired.*renew it at the broker"),
        ({"now": datetime.now(timezone.utc) + timedelta(days=400)}, r"not yet valid.*set the clock .*date is 20"),
        ({"hosts": ["broker.lan"]}, r"mismatch.*broker\.host must be one of the names in its certificate"),
    ],
)
def test_a_broker_whose_certificate_is_not_good_is_refused_in_words(
    changes: dict[str, Any], words: str, mosquitto: Callable[..., Any], tmp_path: Path
) -> None:
    site = Site(tmp_path / "site", **changes)
    broker = mosquitto(site.mosquitto_lines, listener=False)
    with pytest.raises(BrokerRefused, match=words):
        attempt(broker.port, **site.tls("device", "microscope-1"))


def test_check_config_tells_that_the_certificate_ends_soon(site: Site, broker: Any) -> None:
    make_site(site.top, clients=[Client("device", "microscope-3")], days=20)
    folder = site.top / "devices" / "microscope-3"
    text = (folder / "config.yaml").read_text().replace("port: 8883", f"port: {broker.port}")
    config = loads(text, "test", folder=folder, environment={})
    (found,) = (check for check in run_checks(config) if check.name == "broker")
    assert found.is_passed, found.words
    assert "encrypted; broker.tls.certificate_file" in found.words
    assert "expires in 20 days; renew it before" in found.words


# -------------------------------------------------------------------------------------------- changes while it runs


def test_a_device_that_is_added_is_let_in_after_a_reload_and_nobody_is_disturbed(
    site: Site, broker: Any, person: Meet
) -> None:
    collector = person("receiver", "collector")
    collector.subscribe("hv/1/lab/#")
    make_site(site.top, clients=[Client("device", "microscope-3")])
    third = person("device", "microscope-3")
    assert third.publish("hv/1/lab/microscope-3/field/s1") == NOT_AUTHORISED
    os.kill(broker.pid, signal.SIGHUP)
    deadline_s = time.monotonic() + 5
    while third.publish("hv/1/lab/microscope-3/field/s1") == NOT_AUTHORISED:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    collector.wait_for(1)


def test_a_device_that_is_removed_has_no_rights_after_a_reload_and_does_not_come_in_after_a_restart(
    site: Site, broker: Any, person: Meet, tmp_path: Path
) -> None:
    second = person("device", "microscope-2")
    files = {key: tmp_path / f"stolen-{key}" for key in ("certificate_file", "key_file")}
    for key, place in files.items():
        place.write_bytes(site.tls("device", "microscope-2")[key].read_bytes())
    make_site(site.top, remove=["microscope-2"])
    os.kill(broker.pid, signal.SIGHUP)
    deadline_s = time.monotonic() + 5
    while second.publish(f"{TWO}/field/s1") != NOT_AUTHORISED:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    second.close()
    broker.restart()
    with pytest.raises(BrokerRefused, match="our certificate was taken back"):
        attempt(broker.port, ca_file=site.top / "ca" / "ca.pem", **files)
    attempt(broker.port, **site.tls("device", "microscope-1")).disconnect()


def test_what_waits_for_an_absent_collector_is_all_there_after_a_restart_of_the_broker(
    broker: Any, person: Meet
) -> None:
    """By default mosquitto throws away what goes beyond 1000 messages, and everything at a restart."""
    collector = person("receiver", "collector")
    collector.subscribe("hv/1/lab/#")
    collector.close()
    device = person("device", "microscope-1")
    for number in range(1500):
        assert device.publish(f"{ONE}/field/s1", str(number).encode()) == 0
    device.close()
    broker.restart()
    heard = person("receiver", "collector").wait_for(1500, 20)
    assert [int(payload) for _, payload in heard] == list(range(1500))
