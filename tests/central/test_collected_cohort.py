"""The comparison by age band over a real database: figures, guards, formats."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from agent import RESEARCH_USE_ONLY
from agent.analysis.cohort import compare
from agent.analysis.differential import Rules, Tally, make_differential
from agent.central.records import Collection
from agent.central.store import Store
from agent.cli import main
from agent.delivery.reports import differential_body, differential_draft, sample_body
from agent.domain import AgeBand, ModelIdentity, ReferenceInterval, SampleState
from agent.report.cohort import compose_cohort, render_cohort
from tests.central.conftest import arrival
from tests.central.fake_device import BEGAN, PROVENANCE, FakeDevice, Sent

AT = datetime(2026, 11, 26, tzinfo=timezone.utc)
RULES = Rules(
    {"neutrophil": "leukocyte", "lymphocyte": "leukocyte", "erythroblast": "erythroblast"},
    reference=(ReferenceInterval("neutrophil", "adult", 40, 70, "a book"),),
)


def ended(device: FakeDevice, band: AgeBand | None, neutrophils: int, number: int = 1, **changes: Any) -> Sent:
    """A report of a sample of 100 leukocytes and 3 cells without a name, with 10 fields and 10 refused frames."""
    counts = {"neutrophil": neutrophils, "lymphocyte": 100 - neutrophils, "unidentified": 3}
    sample = SampleState(
        device.sample, phase="finished", age_band=band, reports=number, accession=device.sample, refused={"blurred": 10}
    )
    made = make_differential(Tally(counts, 10), RULES, band)
    provenance = changes.pop("provenance", PROVENANCE)
    status = changes.pop("status", "final")
    body = differential_body(made, sample, device.topics, provenance, boot=1, at=BEGAN, status=status)
    return device.number(differential_draft({**body, **changes}, device.topics, device.sample))


def fill(engine: Engine, band: AgeBand | None, neutrophils: list[int], **changes: Any) -> None:
    """A sample for each number, in turn on two microscopes."""
    devices = [FakeDevice(device=f"scope-{number}-{band or 'none'}".lower()) for number in range(2)]
    sent = []
    for number, count in enumerate(neutrophils):
        device = devices[number % 2]
        device.sample = f"{band or 'none'}-{number}"
        sent += [arrival(device.field(cells=2)), arrival(ended(device, band, count, **changes))]
    assert Store(engine).commit(sent).dead == 0


def document_of(engine: Engine) -> dict[str, Any]:
    collected = Collection(engine).cohort()
    return compose_cohort(compare(collected.samples), collected.left_out, {}, AT)


def line_of(document: dict[str, Any], band: str | None, measure: str, name: str = "") -> dict[str, Any]:
    (group,) = [one for one in document["groups"] if one["age_band"] == band]
    (line,) = [one for one in group["lines"] if (one["measure"], one["name"]) == (measure, name)]
    return dict(line)


def test_each_band_has_the_figures_of_its_samples(engine: Engine) -> None:
    fill(engine, "adult", list(range(51, 61)))
    fill(engine, "child", list(range(31, 42)))
    document = document_of(engine)
    adults = line_of(document, "adult", "share", "neutrophil")
    assert (adults["samples"], adults["spread"]["median"]) == (10, 55.5)
    assert (adults["spread"]["low"], adults["spread"]["high"]) == (52.0, 59.0)
    assert line_of(document, "child", "share", "neutrophil")["spread"]["median"] == 36.0
    assert line_of(document, "child", "unidentified")["spread"]["median"] == pytest.approx(100 * 3 / 103, abs=0.01)
    assert line_of(document, "child", "refused")["spread"]["median"] == 50.0
    # The fake device's cells have a probability of 0.9 and no close call.
    assert line_of(document, "adult", "confidence")["spread"]["median"] == 90.0
    assert line_of(document, "adult", "low-margin")["spread"]["median"] == 0.0


def test_only_the_newest_report_of_an_ended_sample_counts(engine: Engine) -> None:
    fill(engine, "adult", [50] * 10)
    store = Store(engine)
    device = FakeDevice(device="scope-9", sample="adult-99")
    store.commit([arrival(ended(device, "adult", 90)), arrival(ended(device, "adult", 20, 2, status="amended"))])
    running = FakeDevice(device="scope-9", sample="runs")
    body = {**ended(running, "adult", 90).body, "status": "preliminary", "report": None}
    for key in ("id", "seq", "historical"):
        del body[key]
    store.commit([arrival(running.document(running.topics.differential("runs"), body))])
    aborted = sample_body(SampleState("gone", phase="aborted"), running.topics, boot=1, at=BEGAN, nucleated=0)
    store.commit([arrival(running.document(running.topics.sample("gone"), aborted))])
    document = document_of(engine)
    assert document["samples"] == 11
    assert document["left_out"] == {"not ended": 1, "thrown over": 1}
    assert line_of(document, "adult", "share", "neutrophil")["spread"]["quarter"] == 50.0


def test_a_small_band_shows_no_figure_in_any_format(engine: Engine) -> None:
    fill(engine, "adult", [50] * 10)
    fill(engine, "newborn", [77] * 9)
    document = document_of(engine)
    (small,) = [group for group in document["groups"] if group["age_band"] == "newborn"]
    assert small == {"age_band": "newborn", "samples": 9, "is_small": True}
    for wanted in ("html", "csv", "json"):
        assert b"77" not in render_cohort({**document, "made_at": "now"}, wanted)
    rows = list(csv.DictReader(io.StringIO(render_cohort(document, "csv").decode())))
    (row,) = [row for row in rows if row["age_band"] == "newborn"]
    assert (row["is_small"], row["band_samples"], row["median"]) == ("yes", "9", "")
    assert {row["notice"] for row in rows} == {RESEARCH_USE_ONLY}


def test_cautions_are_said(engine: Engine) -> None:
    fill(engine, "adult", [50] * 10)
    other = replace(PROVENANCE, classifier=ModelIdentity("new", "2", "d" * 64))
    fill(engine, "child", [50] * 10, provenance=other, accession="A-1")
    fill(engine, None, [50] * 10)
    document = document_of(engine)
    said = " ".join(document["remarks"])
    assert f"{document['intervals']} intervals of 95 %" in said
    assert "miss by chance alone" in said
    assert "not drawn at random" in said
    assert "by the same models" in said
    assert "share their accession token with another one: child 10" in said
    assert "no age band was told" in said
    page = render_cohort(document, "html").decode()
    assert page.count(RESEARCH_USE_ONLY) == 2
    assert "<script" not in page
    assert page.count("<svg") == 2 + 1 + 4  # a panel for each class and measure


def test_nothing_to_compare_is_said(engine: Engine) -> None:
    document = document_of(engine)
    assert document["remarks"] == ["No age band has enough samples: there is nothing to compare."]
    assert b"nothing to compare" in render_cohort(document, "html")


def test_a_band_that_no_version_knows_is_one_that_was_not_told(engine: Engine) -> None:
    device = FakeDevice()
    body = {**ended(device, "adult", 50).body, "age_band": "<b>old</b>"}
    Store(engine).commit([arrival((device.topics.differential("s-1"), json.dumps(body).encode()))])
    assert [sample.age_band for sample in Collection(engine).cohort().samples] == [None]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def test_the_command_compares_what_was_asked_for(
    engine: Engine, database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(engine, "adult", [50] * 12)
    there = ("report", "cohort", "--database", database_url)
    assert run(*there, "--format", "json", "--device", "scope-0-adult", "--fewest-samples", "6") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["samples"], document["selection"]["device"]) == (6, "scope-0-adult")
    assert run(*there, "--format", "json", "--since", "2027-01-01") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 0
    assert run(*there, "--output", str(tmp_path / "cohort.html")) == 0
    assert "12 samples in 1 age bands" in capsys.readouterr().err
    assert run(*there, "--fewest-samples", "5") == 2
    assert run("report", "cohort") == 2
    assert "--database: missing" in capsys.readouterr().err
