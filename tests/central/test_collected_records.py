"""The report of a sample at the centre is the one that the device makes, but for what the centre has not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from agent.analysis.agreement import Answer
from agent.central.intake import Place
from agent.central.records import Collection
from agent.central.store import Arrival, Store
from agent.cli import main
from agent.delivery.audit import ChainHead, Entry, chain
from agent.delivery.messages import RetainedDocument, as_historical
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.delivery.reports import differential_draft, sample_body
from agent.domain import SampleState
from agent.errors import ConfigError
from agent.report.device import read_device
from agent.report.document import compose
from agent.report.formats import Document
from agent.report.html import render_html
from agent.report.record import NothingToReport
from agent.review import answer_note, answers_key
from tests.central.conftest import NOW, arrival
from tests.central.fake_device import BEGAN, FakeDevice
from tests.central.test_export import differential, report

AT = datetime(2026, 11, 25, 10, 0, tzinfo=timezone.utc)
COUNTS = {"neutrophil": 60, "lymphocyte": 35, "unidentified": 3}
BEFORE = {**COUNTS, "neutrophil": 61, "lymphocyte": 34}


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    """A device's own: three fields, a final report, an amended one, an answer that amended and one that agreed."""
    begin_boot(tmp_path)
    device = FakeDevice()
    sample = SampleState("s-1", opened_at="2026-11-25T08:00:00.000Z", ended_at="2026-11-25T08:10:00.000Z")
    with open_outbox(tmp_path, device="scope", min_free_mb=0, keep_mb=1, keep_hours=1) as opened:
        opened.append([device.field_draft(4) for _ in range(3)])
        for number, counts in ((1, BEFORE), (2, COUNTS)):
            body = differential(device, "final" if number == 1 else "amended", counts, number)
            opened.append([differential_draft(body, device.topics, "s-1")])
            opened.append((), documents=[RetainedDocument(device.topics.differential("s-1"), body)])
        told = sample_body(sample, device.topics, boot=1, at=AT, nucleated=95)
        opened.append((), documents=[RetainedDocument(device.topics.sample("s-1"), told)])
        first = ("s-1-1", "neutrophil", "lymphocyte"), ("s-1-2", "lymphocyte", "lymphocyte")
        entries = [
            Entry(
                "cmd.amend",
                "done",
                "words",
                "mtl-7",
                "sender",
                f"t-{cell_id}",
                {"sample": "s-1", "cell_id": cell_id, "from": model, "to": person},
            )
            for cell_id, model, person in first
        ]
        other = Entry("cmd.amend", "done", "x", "mtl-7", None, "t-9", {**(entries[0].detail or {}), "sample": "s-9"})
        refused = Entry("cmd.amend", "refused", "x", "mtl-7", None, "t-8", {"code": "unknown-cell"})
        drafts, _ = chain([*entries, other, refused], ChainHead(), device.topics, boot=1, at=AT)
        notes: dict[str, str | None] = {
            answers_key("s-1", cell_id): answer_note(None, Answer(cell_id, model, person, "mtl-7"))
            for cell_id, model, person in first
        }
        opened.append(drafts, notes=notes)
        yield opened


def collect(outbox: Outbox, engine: Engine, *, is_late: bool = False) -> None:
    """Everything that the device has to say, as the broker hands it over."""
    rows = outbox.pending(0, 1000)
    arrivals = [
        Arrival(row.topic, as_historical(row.payload) if is_late else row.payload, NOW, is_retained=False)
        for row in rows
    ]
    arrivals += [Arrival(one.topic, one.payload or b"", NOW, is_retained=True) for one in outbox.documents()]
    outcome = Store(engine).commit(arrivals)
    assert outcome.dead == 0


def same(document: Document) -> dict[str, Any]:
    """What must be the same on both sides."""
    there_only = {"source", "gallery", "remarks", "review"}
    return {key: value for key, value in document.items() if key not in there_only}


def test_both_sides_give_the_same_document(outbox: Outbox, engine: Engine) -> None:
    collect(outbox, engine)
    collection = Collection(engine)
    at_device = compose(read_device(outbox, FakeDevice().topics, "s-1"), AT)
    at_centre = compose(collection.read(collection.find("s-1"), "s-1"), AT)
    assert same(at_centre) == same(at_device)
    assert (at_centre["report"], at_centre["quality"]["fields_here"]) == ("s-1-r2", 3)
    assert at_centre["opened_at"] == "2026-11-25T08:00:00.000Z"


def test_what_persons_answered_comes_from_the_audit(outbox: Outbox, engine: Engine) -> None:
    collect(outbox, engine)
    at_device = compose(read_device(outbox, FakeDevice().topics, "s-1"), AT)["review"]
    at_centre = compose(Collection(engine).read(Place("lab", "scope"), "s-1"), AT)["review"]
    assert at_centre["agreement"] == at_device["agreement"]
    assert at_centre["persons"] == ["mtl-7"]
    assert at_centre["open"] is None


def test_what_the_centre_has_not_is_said_in_the_report(outbox: Outbox, engine: Engine) -> None:
    collect(outbox, engine)
    document = compose(Collection(engine).read(Place("lab", "scope"), "s-1"), AT)
    page = render_html(document, {})
    assert document["source"] == "collector"
    assert "Pictures of cells stay on the device" in page
    assert "not known here" in page
    assert "from the collector" in page


def test_a_sample_that_runs_has_its_running_differential(engine: Engine) -> None:
    device = FakeDevice()
    running = device.document(device.topics.differential("s-1"), differential(device, "preliminary", COUNTS))
    Store(engine).commit([arrival(running), arrival(device.field())])
    collection = Collection(engine)
    assert collection.samples() == [(Place("lab", "scope"), "s-1", "preliminary")]
    assert compose(collection.read(Place("lab", "scope"), "s-1"), AT)["status"] == "preliminary"


def test_the_newest_word_counts_in_the_list(engine: Engine) -> None:
    one, two = FakeDevice(), FakeDevice(device="other", sample="s-2")
    Store(engine).commit([arrival(report(one, "final", COUNTS)), arrival(report(two, "final", COUNTS))])
    later = {**differential(one, "amended", COUNTS, 2), "at": "2026-11-25T08:30:00.000Z"}
    Store(engine).commit([arrival(one.number(differential_draft(later, one.topics, "s-1")))])
    assert Collection(engine).samples() == [
        (Place("lab", "other"), "s-2", "final"),
        (Place("lab", "scope"), "s-1", "amended"),
    ]


def test_a_sample_of_several_devices_must_be_named_with_its_device(engine: Engine) -> None:
    devices = [FakeDevice(), FakeDevice(device="other")]
    Store(engine).commit([arrival(report(device, "final", COUNTS)) for device in devices])
    collection = Collection(engine)
    with pytest.raises(ConfigError, match="lab/other, lab/scope"):
        collection.find("s-1")
    assert collection.find("s-1", "lab", "other") == Place("lab", "other")
    with pytest.raises(NothingToReport, match="no differential of sample s-7"):
        collection.find("s-7")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def test_the_commands_report_from_a_database(
    outbox: Outbox, engine: Engine, database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collect(outbox, engine, is_late=True)
    there = ("--database", database_url)
    assert run("report", "list", *there) == 0
    assert "lab/scope  s-1  amended" in capsys.readouterr().out
    assert run("report", "s-1", "--format", "json", *there) == 0
    assert json.loads(capsys.readouterr().out)["differential"]["leukocytes"] == 95
    file = tmp_path / "s-1.html"
    assert run("report", "s-1", "--output", str(file), "--sign", *there) == 2
    assert "--key-file" in capsys.readouterr().err
    pytest.importorskip("cryptography")
    key = str(tmp_path / "centre.pem")
    assert run("report", "s-1", "--output", str(file), "--sign", "--key-file", key, *there) == 0
    assert run("report", "verify", str(file)) == 0
    assert run("report", "s-9", *there) == 1
    assert run("report", "s-1", "--database", "sqlite:///not-there.db") == 2


def test_the_times_of_a_running_sample_are_those_that_it_told(engine: Engine) -> None:
    device = FakeDevice()
    told = sample_body(
        SampleState("s-1", opened_at="2026-11-25T08:00:00.000Z"), device.topics, boot=1, at=BEGAN, nucleated=1
    )
    Store(engine).commit(
        [arrival(device.document(device.topics.sample("s-1"), told)), arrival(report(device, "final", COUNTS))]
    )
    # The device clears the topic when the next sample begins; the database keeps what it said last.
    Store(engine).commit([Arrival(device.topics.sample("s-1"), b"", NOW)])
    assert compose(Collection(engine).read(Place("lab", "scope"), "s-1"), AT)["opened_at"] == "2026-11-25T08:00:00.000Z"
