"""Samples, differentials, alerts and replies against their schemas, and what they promise beside them."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import jsonschema
import pytest

from agent.analysis.differential import CellKind, Chamber, Confusion, Rules, Tally, make_differential
from agent.delivery.messages import load_schema, serialise, stamp
from agent.delivery.reports import Alert, Reply, alert_body, differential_body, reply_body, sample_body
from agent.delivery.topics import Topics
from agent.domain import ModelIdentity, Provenance, ReferenceInterval, SampleState

AT = datetime(2026, 11, 25, 8, 0, tzinfo=timezone.utc)
TOPICS = Topics("lab", "scope")
KINDS: dict[str, CellKind] = {"round": "leukocyte", "lobed": "leukocyte", "young": "erythroblast", "red": "red-cell"}
PROVENANCE = Provenance(
    "0.1.0", ModelIdentity("d", "1", "a" * 64), ModelIdentity("c", "1", "b" * 64), "rt", "none", "c" * 64
)
FULL = Rules(
    KINDS,
    confusion=Confusion({"round": {"round": 90, "lobed": 10}, "lobed": {"round": 5, "lobed": 95}}),
    reference=(ReferenceInterval("round", "adult", 10, 20, "a book"),),
    half_width=0.05,
    chamber=Chamber(0.1, 20),
)
COUNTS = {"round": 30, "lobed": 70, "young": 2, "red": 900, "unidentified": 4}


def check(kind: str, message: Any) -> Any:
    heard = json.loads(serialise(message))
    jsonschema.Draft202012Validator(load_schema(kind)).validate(heard)
    return heard


def make_body(status: Any = "preliminary", counts: Any = COUNTS, rules: Rules = FULL, reports: int = 0) -> Any:
    sample = SampleState("s-1", accession="A-1", age_band="adult", reports=reports)
    made = make_differential(Tally(counts, 10, area_um2=1e6), rules, "adult")
    return differential_body(made, sample, TOPICS, PROVENANCE, boot=3, at=AT, status=status)


def test_a_preliminary_differential_is_a_document_without_a_number() -> None:
    heard = check("differential", make_body())
    assert (heard["status"], heard["report"], heard["supersedes"]) == ("preliminary", None, None)
    assert "seq" not in heard
    assert heard["shares"][0] == {
        "class": "round",
        "count": 30,
        "pct": 30.0,
        "low_pct": 21.24,
        "high_pct": 39.98,
        "corrected": heard["shares"][0]["corrected"],
        "flag": "high",
        "reference": {"low_pct": 10, "high_pct": 20, "source": "a book"},
    }
    assert heard["still_needed"] > 0
    assert [one["name"] for one in heard["per_ul"]] == ["leukocyte", "erythroblast", "platelet", "red-cell"]


def test_a_final_one_is_numbered_and_an_amended_one_names_what_it_supersedes() -> None:
    final = check("differential", stamp(make_body("final", reports=1), "scope", 3, 1))
    assert (final["report"], final["supersedes"], final["seq"]) == ("s-1-r1", None, 1)
    amended = check("differential", stamp(make_body("amended", reports=2), "scope", 3, 2))
    assert (amended["report"], amended["supersedes"]) == ("s-1-r2", "s-1-r1")


@pytest.mark.parametrize("counts", [{}, {"unidentified": 3}, {"round": 1}, {"red": 5}])
def test_a_differential_of_little_is_valid_too(counts: dict[str, int]) -> None:
    check("differential", make_body(counts=counts))
    check("differential", make_body(counts=counts, rules=Rules({})))


def test_a_sample_tells_where_it_stands() -> None:
    sample = SampleState("s-1", fields=3, counts={"round": 2}, target_cells=100, opened_at="2026-11-25T07:00:00.000Z")
    heard = check("sample", sample_body(sample, TOPICS, boot=3, at=AT, nucleated=2))
    assert (heard["phase"], heard["stop_at"]) == ("running", {"cells": 100, "half_width_pct": None})
    check("sample", sample_body(SampleState("s-2", phase="idle"), TOPICS, boot=3, at=AT, nucleated=0))


def test_alerts_and_replies_are_valid_even_when_nobody_found_words() -> None:
    check("alert", alert_body(Alert("camera-lost", "error", "", AT), TOPICS, boot=3))
    reply = Reply("x" * 500, None, "refused", "unknown-command", "y" * 5000, {})
    heard = check("reply", reply_body(reply, TOPICS, boot=3, at=AT))
    assert (len(heard["command"]), len(heard["message"]), heard["repeated"]) == (64, 2000, False)
