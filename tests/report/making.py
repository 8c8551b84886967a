"""Messages of a small sample, as the agent would send them: made by the agent's own functions, of plain numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from agent.analysis.agreement import Answer
from agent.analysis.differential import CellKind, Confusion, Rules, make_differential
from agent.delivery.reports import differential_body
from agent.delivery.topics import Topics
from agent.domain import AgeBand, ModelIdentity, Provenance, ReferenceInterval, SampleState, Software, Thresholds
from agent.report.record import SampleRecord
from agent.reporting import status_of, tally_of
from agent.review import KeptCell

AT = datetime(2026, 11, 25, 9, 0, tzinfo=timezone.utc)
TOPICS = Topics("lab", "scope")
PROVENANCE = Provenance(
    "0.1",
    ModelIdentity("det", "1", "a" * 64),
    ModelIdentity("cls", "2", "b" * 64),
    "litert",
    "none",
    "c" * 64,
    Software("aarch64", "3.11.2", "2.3.4", "4.12.0"),
    Thresholds(0.25, 0.75, 0.5, "d" * 64),
)
KINDS: Mapping[str, CellKind] = {
    "round": "leukocyte",
    "lobed": "leukocyte",
    "red": "red-cell",
    "young": "erythroblast",
    "plate": "platelet",
}
REFERENCE = (ReferenceInterval("round", "adult", 10.0, 20.0, "a book <1st edition>"),)
CONFUSION = Confusion({"round": {"round": 95, "lobed": 5}, "lobed": {"round": 2, "lobed": 98}})


def make_report(
    counts: Mapping[str, int], number: int = 1, age_band: AgeBand | None = "adult", **changes: Any
) -> dict[str, Any]:
    """A numbered differential. number 0: the running one."""
    phase = "finished" if number else "running"
    sample = SampleState(
        "s-1", fields=2, counts=counts, phase=phase, reports=number, accession="A-1", age_band=age_band, **changes
    )
    rules = Rules(KINDS, confusion=CONFUSION, reference=REFERENCE)
    made = make_differential(tally_of(sample), rules, age_band)
    return differential_body(
        made, sample, TOPICS, PROVENANCE, boot=1, at=AT, status=status_of(sample), amendments=sample.amendments
    )


def make_cell(number: int, name: str = "round", x: float = 50.0, **changes: Any) -> dict[str, Any]:
    return {
        "cell_id": f"s-1-{number}",
        "box": [x - 10, 40.0, x + 10, 60.0],
        "detector": {"class": "WBC", "score": 0.9},
        "class": name,
        "probability": 0.9,
        "probabilities": {name: 0.9, "other": 0.1},
        "margin": 0.8,
        "status": "accepted",
        "counted": True,
        **changes,
    }


def make_field(number: int, cells: Iterable[Mapping[str, Any]] = (), **changes: Any) -> dict[str, Any]:
    return {
        "seq": number,
        "captured_at": f"2026-11-25T08:00:{number:02}.000Z",
        "clock": {"synchronised": True, "offset_ms": 0.1},
        "frame": {"n": number, "sha256_16": "0" * 16, "width_px": 100, "height_px": 80, "focus": 10.0 * number},
        "place": {
            "source": "registered",
            "part": 1,
            "x_px": 90.0 * number,
            "y_px": 0.0,
            "turn_deg": 0,
            "confidence": 1,
        },
        "cells": list(cells),
        "provenance": make_report({"round": 1})["provenance"],
        **changes,
    }


def make_record(**changes: Any) -> SampleRecord:
    named: dict[str, Any] = {
        "differentials": [make_report({"round": 30, "lobed": 70, "red": 400})],
        "fields": [make_field(1, [make_cell(1)]), make_field(2, [make_cell(2, "lobed")])],
        **changes,
    }
    return SampleRecord("device", "lab", "scope", "s-1", **named)


def make_crop(number: int, name: str = "round", **changes: Any) -> KeptCell:
    named: dict[str, Any] = {"probability": 0.9, "margin": 0.1, "reason": "low-margin", **changes}
    return KeptCell("s-1", f"s-1-{number}", name, name, jpeg=b"\xff\xd8pixels\xff\xd9", **named)


def make_answer(number: int, model: str = "round", person: str = "round") -> Answer:
    return Answer(f"s-1-{number}", model, person, "mtl-7", "2026-11-25T09:00:00.000Z")
