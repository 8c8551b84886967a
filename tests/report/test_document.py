"""What a report says of a sample, and what it warns of."""

from __future__ import annotations

import json

import pytest
from making import AT, make_answer, make_cell, make_crop, make_field, make_record, make_report

from agent.report.document import compose
from agent.report.record import NothingToReport


def test_the_report_holds_the_newest_differential_and_names_the_ones_before() -> None:
    first, second = make_report({"round": 1}), make_report({"round": 2}, 2, amendments=1)
    document = compose(make_record(differentials=[first, second]), AT)
    assert (document["status"], document["report"]) == ("amended", "s-1-r2")
    assert document["differential"]["leukocytes"] == 2
    assert [report["report"] for report in document["history"]] == ["s-1-r1", "s-1-r2"]
    assert document["ruo"] is True
    json.dumps(document, allow_nan=False)


def test_a_sample_without_a_differential_cannot_be_reported() -> None:
    with pytest.raises(NothingToReport, match="s-1"):
        compose(make_record(differentials=[]), AT)


def test_fields_that_are_not_kept_any_more_are_told() -> None:
    document = compose(make_record(fields=[make_field(1)]), AT)
    assert document["quality"]["fields_here"] == 1
    assert any("Only 1 of 2 fields" in remark for remark in document["remarks"])


def test_a_running_sample_lost_places_a_wrong_clock_and_other_models_are_told() -> None:
    other = {**make_field(1)["provenance"], "agent": "0.2"}
    fields = [make_field(1, clock={"synchronised": False, "offset_ms": None}), make_field(2, provenance=other)]
    report = make_report({"round": 1}, 0, None, unplaced=1)
    document = compose(make_record(differentials=[report], fields=fields), AT)
    words = " ".join(document["remarks"])
    for part in ("running differential", "unknown place", "clock", "Models or configuration", "No age band"):
        assert part in words
    assert [other["fields"] for other in document["provenance"]["others"]] == [1]


def test_a_sample_without_a_fault_needs_no_remark() -> None:
    assert compose(make_record(), AT)["remarks"] == []


def test_refused_frames_and_focus_are_told() -> None:
    report = make_report({"round": 1}, refused={"blurred": 3, "dark": 1})
    quality = compose(make_record(differentials=[report]), AT)["quality"]
    assert quality["refused"] == {"blurred": 3, "dark": 1}
    assert quality["focus"] == {"median": 15.0, "lowest": 10.0, "p05": 10.0, "highest": 20.0}


def test_confidence_is_of_cells_and_not_of_their_other_views_or_of_dirt() -> None:
    cells = [make_cell(1), make_cell(2, status="duplicate"), make_cell(3, status="artefact")]
    cells += [make_cell(4, status="unidentified", margin=0.1), make_cell(5, "red", probabilities={}, margin=None)]
    classes = compose(make_record(fields=[make_field(1, cells)]), AT)["classes"]
    assert [(one["class"], one["cells"], one["low_margin"]) for one in classes] == [
        ("round", 1, 0),
        ("unidentified", 1, 1),
    ]


def test_the_gallery_shows_a_cell_under_the_name_that_a_person_gave() -> None:
    crops = {f"s-1-{n}": make_crop(n) for n in range(1, 20)}
    document = compose(make_record(crops=crops, answers=[make_answer(3, "round", "lobed")]), AT)
    assert [(p["cell_id"], p["named_by"]) for p in document["gallery"] if p["class"] == "lobed"] == [
        ("s-1-3", "person")
    ]
    assert len(document["gallery"]) == 1 + 12
    assert len(document["gallery"][0]["jpeg_sha256"]) == 64
