"""What was collected comes out whole, in every format, from both databases."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fhir.resources.R4B.bundle import Bundle as BundleR4B
from fhirclient.models.bundle import Bundle
from sqlalchemy import Engine

from agent.analysis.differential import Rules, Tally, make_differential
from agent.central.codes import Codes, load_codes
from agent.central.export import TABLES, Selection, export
from agent.central.store import Store
from agent.cli import EXPORT_TABLES
from agent.delivery.messages import serialise
from agent.delivery.reports import differential_body, differential_draft
from agent.domain import ReferenceInterval, SampleState
from agent.errors import ConfigError
from tests.central.collecting import ROOT
from tests.central.conftest import arrival
from tests.central.fake_device import BEGAN, PROVENANCE, FakeDevice, Sent

RULES = Rules(
    {"neutrophil": "leukocyte", "lymphocyte": "leukocyte", "blast": "leukocyte", "erythroblast": "erythroblast"},
    reference=(ReferenceInterval("neutrophil", "adult", 40, 70, "a book"),),
)
EVERYTHING = Selection()


def differential(device: FakeDevice, status: Any, counts: dict[str, int], reports: int = 1) -> dict[str, Any]:
    made = make_differential(Tally(counts, 10), RULES, "adult")
    sample = SampleState(device.sample, accession="A-17", age_band="adult", reports=reports)
    return differential_body(made, sample, device.topics, PROVENANCE, boot=device.boot, at=BEGAN, status=status)


def report(device: FakeDevice, status: Any, counts: dict[str, int], reports: int = 1) -> Sent:
    body = differential(device, status, counts, reports)
    return device.number(differential_draft(body, device.topics, device.sample))


@pytest.fixture
def collected(engine: Engine) -> Engine:
    """Three fields of one sample and one of another, an event, a final and an amended differential."""
    device, other = FakeDevice(), FakeDevice(device="other", sample="s-2")
    counts = {"neutrophil": 80, "lymphocyte": 15, "blast": 5, "erythroblast": 2, "unidentified": 3}
    sent = [
        *device.fields(3, cells=2),
        other.field(cells=1),
        device.event(),
        report(device, "final", {**counts, "neutrophil": 79}),
        report(device, "amended", counts, reports=2),
    ]
    running = other.topics.differential("s-2"), serialise(differential(other, "preliminary", {"lymphocyte": 4}))
    Store(engine).commit([*(arrival(one) for one in sent), arrival(running)])
    return engine


def written(
    engine: Engine, table: str, wanted: Any, selection: Selection = EVERYTHING, codes: Codes | None = None
) -> bytes:
    sink = io.BytesIO()
    _, complaints = export(engine, table, wanted, selection, sink, codes)
    assert complaints == []
    return sink.getvalue()


def lines(payload: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in payload.splitlines()]


def bundle(engine: Engine, codes: Codes | None = None, sample: str = "s-1") -> dict[str, Any]:
    (one,) = lines(written(engine, "cells", "fhir", Selection(sample=sample), codes or load_codes(None)))
    return one


def resources(one: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [entry["resource"] for entry in one["entry"] if entry["resource"]["resourceType"] == kind]


def test_cells_as_csv_are_rows_that_a_table_program_reads(collected: Engine) -> None:
    rows = list(csv.DictReader(io.StringIO(written(collected, "cells", "csv").decode())))
    assert len(rows) == 7
    assert rows[0]["class"] == "neutrophil"
    assert rows[0]["captured_at"].endswith("Z")
    assert json.loads(rows[0]["probabilities"])["neutrophil"] == 0.9


def test_jsonl_gives_the_messages_as_they_were_sent(collected: Engine) -> None:
    exported = lines(written(collected, "fields", "jsonl", Selection(device="scope")))
    assert exported == [field.body for field in FakeDevice().fields(3, cells=2)]


def test_parquet_keeps_the_types(collected: Engine) -> None:
    table = pq.read_table(io.BytesIO(written(collected, "cells", "parquet")))
    assert table.num_rows == 7
    assert str(table.schema.field("captured_at").type) == "timestamp[ms, tz=UTC]"
    assert str(table.schema.field("probability").type) == "double"
    assert sorted(table.column("class").to_pylist()) == ["lymphocyte"] * 3 + ["neutrophil"] * 4


@pytest.mark.parametrize("table", sorted(TABLES))
@pytest.mark.parametrize("wanted", ["csv", "jsonl", "parquet"])
def test_every_table_comes_in_every_format(collected: Engine, table: str, wanted: Any) -> None:
    assert written(collected, table, wanted) or table in ("audit", "alerts", "gaps", "dead_letters")


def test_the_command_line_offers_the_tables_that_there_are() -> None:
    assert set(EXPORT_TABLES) == set(TABLES)


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        (Selection(sample="s-2"), 1),
        (Selection(device="scope"), 3),
        (Selection(site="elsewhere"), 0),
        (Selection(since=datetime(2026, 11, 25, 8, 0, 2, tzinfo=timezone.utc)), 2),
        (Selection(until=datetime(2026, 11, 25, 8, 0, 2, tzinfo=timezone.utc)), 2),
    ],
)
def test_only_what_is_asked_for_is_exported(collected: Engine, selection: Selection, count: int) -> None:
    assert len(lines(written(collected, "fields", "jsonl", selection))) == count


def test_a_question_that_a_table_cannot_answer_is_refused(collected: Engine) -> None:
    with pytest.raises(ConfigError, match="events does not know samples"):
        written(collected, "events", "csv", Selection(sample="s-1"))


# ------------------------------------------------------------------------------------------------------------ FHIR


def test_the_newest_report_of_a_sample_is_a_bundle_that_two_libraries_take(collected: Engine) -> None:
    one = bundle(collected)
    assert Bundle(one).as_json() == one  # FHIR 4.0.1
    BundleR4B.model_validate(one)  # and 4.3.0, by another library
    (made,) = resources(one, "DiagnosticReport")
    assert made["status"] == "amended"
    assert made["identifier"][0]["value"] == "lab/scope/s-1/s-1-r2"
    assert [entry["fullUrl"] for entry in one["entry"][1:5]] == [result["reference"] for result in made["result"]]


def test_shares_carry_their_codes_counts_and_intervals(collected: Engine) -> None:
    observed = {one["code"]["text"]: one for one in resources(bundle(collected), "Observation")}
    neutrophil = observed["neutrophil"]
    assert neutrophil["code"]["coding"][0]["code"] == "26511-6"
    assert neutrophil["valueQuantity"]["value"] == 80.0
    assert neutrophil["valueQuantity"]["code"] == "%"
    count, low, high = (part["valueQuantity"]["value"] for part in neutrophil["component"])
    assert count == 80
    assert low < 80 < high
    assert neutrophil["interpretation"][0]["coding"][0]["code"] == "H"
    assert neutrophil["referenceRange"][0]["text"] == "a book"
    assert observed["erythroblast"]["code"]["coding"][0]["code"] == "19048-8"
    assert observed["erythroblast"]["valueQuantity"] == {
        "value": 2.0,
        "unit": "/100{WBCs}",
        "system": "http://unitsofmeasure.org",
        "code": "/100{WBCs}",
    }


def test_a_class_without_a_code_is_exported_by_its_name(collected: Engine) -> None:
    (blast,) = [one for one in resources(bundle(collected), "Observation") if one["code"]["text"] == "blast"]
    assert "coding" not in blast["code"]


def test_everything_says_that_it_is_for_research_and_the_codes_an_example(collected: Engine) -> None:
    one = bundle(collected)
    for made in resources(one, "Observation"):
        assert made["meta"]["tag"][0]["code"] == "research-use-only"
        assert "Research use only" in made["note"][0]["text"]
        assert "no laboratory has signed them off" in made["note"][0]["text"]
    assert "Research use only" in resources(one, "DiagnosticReport")[0]["conclusion"]


def test_a_laboratory_brings_its_own_codes(collected: Engine, tmp_path: Path) -> None:
    path = tmp_path / "codes.yaml"
    path.write_text(
        "signed_off_by: Dr. A. Example\n"
        "report: {text: Differential, code: LAB-1, display: Diff, system: 'urn:lab'}\n"
        "shares:\n  blast: {code: B-1, display: Blasts, system: 'urn:lab'}\n"
    )
    one = bundle(collected, load_codes(path))
    assert resources(one, "DiagnosticReport")[0]["code"]["coding"][0]["code"] == "LAB-1"
    observed = {made["code"]["text"]: made for made in resources(one, "Observation")}
    assert observed["blast"]["code"]["coding"][0] == {"system": "urn:lab", "code": "B-1", "display": "Blasts"}
    assert "signed them off" not in observed["blast"]["note"][0]["text"]


def test_no_patient_stands_in_it_only_the_laboratorys_token(collected: Engine) -> None:
    one = bundle(collected)
    assert "subject" not in json.dumps(one)
    assert resources(one, "Specimen")[0]["accessionIdentifier"]["value"] == "A-17"


def test_a_running_differential_is_a_preliminary_report(collected: Engine) -> None:
    assert resources(bundle(collected, sample="s-2"), "DiagnosticReport")[0]["status"] == "preliminary"


def test_the_same_export_gives_the_same_bytes(collected: Engine) -> None:
    assert bundle(collected) == bundle(collected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shares: {a: {code: 1-1}}", "shares.a.display"),
        ("share: {}", "share: Extra inputs"),
        ("a: [", "this is not YAML"),
        ("- 1", "all: Input should be"),
    ],
)
def test_faulty_codes_are_refused_with_the_place(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "codes.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_codes(path)


# ------------------------------------------------------------------------------------------------------ the command


def hematovision(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "agent", "export", *arguments], cwd=ROOT, capture_output=True, timeout=60, check=False
    )


def test_the_command_writes_to_standard_output_or_a_whole_file(
    collected: Engine, database_url: str, tmp_path: Path
) -> None:
    printed = hematovision("--database", database_url, "--format", "csv", "--table", "fields")
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == written(collected, "fields", "csv")
    assert b"4 rows of fields. Research use only" in printed.stderr
    output = tmp_path / "fields.csv"
    done = hematovision("--database", database_url, "--format", "csv", "--table", "fields", "--output", str(output))
    assert (done.returncode, done.stdout) == (0, b"")
    assert output.read_bytes() == printed.stdout
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--database", "sqlite:////nowhere/x.db", "--format", "csv"), 2, b"there is no such file"),
        (("--database", "sqlite:///x.db", "--format", "csv", "--since", "yesterday"), 2, b"found 'yesterday'"),
        (("--database", "sqlite:///x.db"), 2, b"--format"),
        (("--database", "postgresql://nobody@127.0.0.1:1/x", "--format", "csv"), 5, b"database postgresql://"),
    ],
)
def test_what_cannot_be_exported_ends_with_a_sentence(arguments: tuple[str, ...], code: int, words: bytes) -> None:
    done = hematovision(*arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.usefixtures("collected")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_leaves_no_half_file(database_url: str, tmp_path: Path) -> None:
    (tmp_path / ".x.csv.unfinished").symlink_to("/dev/full")
    done = hematovision("--database", database_url, "--format", "csv", "--output", str(tmp_path / "x.csv"))
    assert done.returncode == 5
    assert b"No space left" in done.stderr
    assert not (tmp_path / "x.csv").exists()
