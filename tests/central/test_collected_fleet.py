"""The fleet over real databases and a real broker: who stands out is told, and cleared when it is over."""

from __future__ import annotations

import csv
import io
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from sqlalchemy import Engine

from agent import RESEARCH_USE_ONLY
from agent.central import tables
from agent.central.fleet import look_at_fleet, read_fleet, standing_out
from agent.central.store import Store
from agent.cli import main
from agent.delivery.messages import DescribedModel, health_body, info_body, load_schema, serialise
from agent.domain import AgentState, ClockReading, DriftReading, FigureReading, ModelIdentity
from agent.health import Health, MachineReading
from tests.central.collecting import CollectorProcess, Wire, wait_until
from tests.central.conftest import NOW, arrival
from tests.central.fake_device import FakeDevice

USUAL = {"ground-red": 1.1, "stain-density": 0.2, "confidence": 95.0, "unidentified": 3.0, "share-neutrophil": 60.0}


def health_of(device: FakeDevice, at: datetime = NOW, **changes: float) -> tuple[str, bytes]:
    """Its newest health message, with the usual figures but for the changes (`_` for `-`)."""
    values = {**USUAL, **{name.replace("_", "-"): value for name, value in changes.items()}}
    figures = {name: FigureReading(value, value, value * 0.98, value * 1.02, "unit") for name, value in values.items()}
    health = Health()
    health.drift(DriftReading(30, 30, figures))
    machine = MachineReading(None, None, None, None, ClockReading(True))
    who = {"device": device.topics.device, "site": device.topics.site}
    body = health_body(health.snapshot(), machine, boot=1, at=at, state=AgentState.READY, interval_s=30, **who)
    return device.topics.health, serialise(body)


def info_of(device: FakeDevice) -> tuple[str, bytes]:
    body = info_body(
        device=device.topics.device,
        site=device.topics.site,
        boot=1,
        started_at=NOW,
        agent_version="0.1.0",
        models=[DescribedModel("detector", ModelIdentity("finder", "1", "a" * 64), ["WBC"])],
        config_sha256="c" * 64,
        runtime="r",
        delegate="none",
    )
    return device.topics.info, serialise(body)


def make_devices(number: int = 5) -> list[FakeDevice]:
    return [FakeDevice(device=f"scope-{index}") for index in range(number)]


def take(engine: Engine, *messages: tuple[str, bytes]) -> None:
    assert Store(engine).commit([arrival(message) for message in messages]).dead == 0


def test_a_device_that_stands_out_is_told_once_and_cleared_when_it_is_back(engine: Engine, rows: Any) -> None:
    devices = make_devices()
    take(engine, *map(info_of, devices), *map(health_of, devices))
    assert look_at_fleet(engine, "central", None, NOW) == []
    take(engine, health_of(devices[2], stain_density=0.5))
    (news,) = look_at_fleet(engine, "central", None, NOW)
    assert (news.place.device, news.body is not None) == ("scope-2", True)
    jsonschema.Draft202012Validator(load_schema("fleet")).validate(news.body)
    assert news.body is not None
    assert news.body["message"].startswith("the density of the stain is 0.5 here, 0.2 on 4 others")
    assert [one["name"] for one in news.body["figures"]] == ["stain-density"]
    (row,) = rows(tables.alerts)
    assert (row["device"], row["alert"], row["cleared_at"]) == ("scope-2", "fleet", None)

    later = NOW + timedelta(minutes=5)
    take(engine, health_of(devices[2], stain_density=0.51))
    assert look_at_fleet(engine, "central", None, later) == []
    assert [one.body for one in standing_out(engine, None)] == [news.body]
    take(engine, health_of(devices[2], stain_density=0.5, confidence=60.0))
    (more,) = look_at_fleet(engine, "central", None, later)
    assert more.body is not None
    assert more.body["since"] == news.body["since"]
    assert len(more.body["figures"]) == 2
    take(engine, health_of(devices[2]))
    (over,) = look_at_fleet(engine, "central", None, later)
    assert (over.place.device, over.body) == ("scope-2", None)
    assert standing_out(engine, None) == []
    assert rows(tables.alerts)[0]["cleared_at"] == later


def test_who_learns_or_is_silent_or_does_not_watch_is_left_out(engine: Engine) -> None:
    devices = make_devices(6)
    take(engine, *map(info_of, devices), *map(health_of, devices))
    take(engine, health_of(devices[0], at=NOW - timedelta(days=8)))
    for device, drift in (
        (devices[1], None),
        (devices[2], {"slides": 3, "of_slides": 30, "figures": {}}),
        (devices[3], {"slides": 30, "of_slides": 30, "figures": {"of-tomorrow": {"now": 1}, "ground-red": "?"}}),
    ):
        body = {**json.loads(health_of(device)[1]), "drift": drift}
        take(engine, (device.topics.health, serialise(body)))
    fleet = read_fleet(engine, None, NOW)
    assert [device.place[1] for device in fleet.devices] == ["scope-4", "scope-5"]
    assert fleet.left_out == {"silent for 7 days": 1, "not watched there": 1, "still learning": 2}
    assert read_fleet(engine, "elsewhere", NOW).devices == []


def test_a_device_that_falls_silent_stands_out_no_more(engine: Engine) -> None:
    devices = make_devices()
    take(engine, *map(info_of, devices), *map(health_of, devices), health_of(devices[0], ground_red=2.0))
    assert len(look_at_fleet(engine, "central", None, NOW)) == 1
    (news,) = look_at_fleet(engine, "central", None, NOW + timedelta(days=8))
    assert news.body is None


def test_the_collector_tells_it_at_the_broker_and_clears_it_there(
    database_url: str, tmp_path: Path, mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/+/+/fleet/#")
    collector = CollectorProcess(tmp_path, database_url, broker.port, fleet_every_s=0.3)
    collector.start()
    try:
        wait_until(lambda: "hv/1/+/+/reply/replay" in broker.log_text(), "the collector listens")
        devices, wire = make_devices(), Wire(broker.port)
        now = datetime.now(timezone.utc)
        wire.send([*map(info_of, devices), *(health_of(one, now) for one in devices)], retain=True)
        wire.send([health_of(devices[1], now, ground_red=1.9)], retain=True)
        ears.wait_for(lambda _: bool(ears.of_kind("fleet")))
        (heard,) = ears.of_kind("fleet")
        assert heard.topic == "hv/1/lab/scope-1/fleet/central"
        jsonschema.Draft202012Validator(load_schema("fleet")).validate(heard.body)
        assert "red over green of the ground is 1.9 here, 1.1 on 4 others" in heard.body["message"]
        # Who comes late hears it too; a collector that is started anew knows what it has to clear.
        late = subscriber(broker, "hv/1/+/+/fleet/#")
        late.wait_for(lambda _: bool(late.of_kind("fleet")))
        assert late.of_kind("fleet")[0].is_retained
        collector.kill()
        collector.start()
        wire.send([health_of(devices[1], now)], retain=True)
        ears.wait_for(lambda heard: heard[-1].payload == b"")
        assert ears.wait_for(lambda _: True)[-1].topic == "hv/1/lab/scope-1/fleet/central"
        wire.close()
        assert collector.terminate() == 0
    finally:
        collector.kill()


def test_a_collector_that_is_told_not_to_compare_says_nothing(tmp_path: Path, mosquitto: Any, subscriber: Any) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/+/+/#")
    url = f"sqlite:///{tmp_path}/central.db"
    collector = CollectorProcess(tmp_path, url, broker.port, fleet_every_s=0)
    collector.start()
    try:
        wait_until(lambda: "hv/1/+/+/reply/replay" in broker.log_text(), "the collector listens")
        devices, wire = make_devices(), Wire(broker.port)
        now = datetime.now(timezone.utc)
        documents = [*map(info_of, devices), *(health_of(one, now) for one in devices[1:])]
        wire.send([*documents, health_of(devices[0], now, ground_red=1.9)])
        wire.send(devices[0].fields(1))
        ears.wait_for(lambda _: bool(ears.of_kind("ack")))
        assert collector.terminate() == 0
        assert ears.of_kind("fleet") == []
        wire.close()
    finally:
        collector.kill()


# ------------------------------------------------------------------------------------------------------ the report


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def filled(tmp_path: Path) -> str:
    from agent.central.database import migrate, open_database

    url = f"sqlite:///{tmp_path}/central.db"
    engine = open_database(url)
    migrate(engine)
    devices, now = make_devices(), datetime.now(timezone.utc)
    take(engine, *map(info_of, devices), *(health_of(one, now) for one in devices))
    take(engine, health_of(devices[3], now, unidentified=40.0))
    engine.dispose()
    return url


def test_the_report_shows_each_device_beside_the_others(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    url = filled(tmp_path)
    assert run(["report", "fleet", "--database", url, "--format", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capfdbinary.readouterr().out.decode())))
    assert len(table) == 5 * len(USUAL)
    (odd,) = [row for row in table if row["stands_out"] == "yes"]
    assert (odd["device"], odd["figure"], odd["here"], odd["devices"]) == ("scope-3", "unidentified", "40.0", "4")
    assert {row["notice"] for row in table} == {RESEARCH_USE_ONLY}
    assert run(["report", "fleet", "--database", url, "--format", "json"]) == 0
    document = json.loads(capfdbinary.readouterr().out)
    assert document["ruo"] is True
    assert [one["device"] for one in document["devices"]] == [f"scope-{number}" for number in range(5)]
    page = tmp_path / "fleet.html"
    assert run(["report", "fleet", "--database", url, "--output", str(page)]) == 0
    assert b"5 devices, 1 stand out" in capfdbinary.readouterr().err
    assert page.read_text().count("STANDS OUT") == 1
    assert RESEARCH_USE_ONLY in page.read_text()


def test_what_makes_no_sense_for_a_fleet_is_refused_in_words(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "fleet", "--device", "scope-1", "--since", "2026-01-01"]) == 2
    told = capfd.readouterr().err
    assert "--database: missing" in told
    assert "--device: leave it out" in told
    assert "--since: leave it out" in told
