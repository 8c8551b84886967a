"""Every kind of message against its schema, and what the builders promise beside it."""

from __future__ import annotations

import json
import math
from datetime import datetime, timedelta, timezone
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.delivery.messages import (
    SCHEMAS,
    DescribedModel,
    Draft,
    as_historical,
    cell_bodies,
    event_body,
    event_draft,
    field_body,
    field_drafts,
    health_body,
    info_body,
    load_schema,
    message_id,
    rfc3339_ms,
    round_probabilities,
    serialise,
    stamp,
    state_body,
)
from agent.delivery.topics import Topics
from agent.domain import (
    AgentState,
    Box,
    Cell,
    CellStatus,
    Classification,
    ClockReading,
    Detection,
    DriftReading,
    FieldResult,
    FigureReading,
    Frame,
    FrameColour,
    FrameQuality,
    JoinedPart,
    ModelIdentity,
    Provenance,
    SlidePlace,
)
from agent.errors import MessageRejected
from agent.health import HealthSnapshot, MachineReading, SelfTest, StageTiming, Throttling

AT = datetime(2026, 11, 23, 8, 30, 15, 123_987, tzinfo=timezone.utc)
TOPICS = Topics("lab-1", "scope-1")
WHO = {"device": "scope-1", "site": "lab-1"}
DETECTOR = ModelIdentity("finder", "1.0", "a" * 64)
CLASSIFIER = ModelIdentity("namer", "1.0", "b" * 64)


def check(kind: str, message: Any) -> Any:
    """The message as a subscriber reads it, valid by its schema."""
    heard = json.loads(serialise(message))
    jsonschema.Draft202012Validator(load_schema(kind)).validate(heard)
    return heard


def make_cell(**changes: Any) -> Cell:
    named = {
        "cell_id": "s1-1",
        "detection": Detection(Box(10.04, 20.06, 30.25, 40.75), "nucleated", 0.912345),
        "class_name": "round",
        "probability": 0.9,
        "classification": Classification("round", 0.9, {"round": 0.9, "lobed": 0.06, "grainy": 0.04}),
        "status": CellStatus.ACCEPTED,
    }
    return Cell(**{**named, **changes})


def make_result(*cells: Cell, **changes: Any) -> FieldResult:
    frame = Frame(
        number=7,
        pixels_bgr=np.zeros((48, 64, 3), np.uint8),
        captured_at=AT,
        captured_monotonic_ns=123_456_789,
        sha256="0123456789abcdef" * 4,
        source="/somewhere/patient-name.png",
        **changes.pop("frame", {}),
    )
    named = {
        "frame": frame,
        "quality": FrameQuality(True, (), 123.456, 0.5, FrameColour((201.26, 228.0, 254.0), (0.1, 0.2, 0.15))),
        "cells": cells,
        "counts": {"round": 1},
        "unique_counts": {},
        "duplicates": 0,
        "timing_ms": {"capture": 1.0, "quality": 2.0, "detect": 3.0, "crop": 0.5, "classify": 4.0, "total": 10.5},
        "provenance": Provenance("0.1.0", DETECTOR, CLASSIFIER, "ai-edge-litert 2.3.0", "xnnpack", "c" * 64),
        "clock": ClockReading(is_synchronised=True, offset_ms=0.25),
    }
    return FieldResult(**{**named, **changes})


def make_snapshot(**changes: Any) -> HealthSnapshot:
    named = {
        "uptime_s": 12.34,
        "fields": 5,
        "fields_per_min": 60.0,
        "dropped": {"frozen": 2},
        "timings": {"detect": StageTiming(10.0, 20.0)},
        "camera": "open",
        "camera_detail": "",
        "broker": "connected",
        "broker_detail": "",
        "outbox": "ok",
        "outbox_detail": "",
        "outbox_depth": 0,
        "outbox_oldest_age_s": None,
    }
    return HealthSnapshot(**{**named, **changes})


# ------------------------------------------------------------------------------------------------------- the schemas


@pytest.mark.parametrize("kind", SCHEMAS)
def test_each_schema_is_a_valid_strict_schema_of_its_own_name(kind: str) -> None:
    schema = load_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == f"urn:hematovision:schema:hv:1:{kind}"
    assert schema["properties"]["schema"]["const"] == f"hv/1/{kind}"
    for part in objects_with_properties(schema):
        assert part["additionalProperties"] is False
        assert set(part["required"]) <= set(part["properties"])


def objects_with_properties(schema: Any) -> list[Any]:
    if isinstance(schema, list):
        return [part for entry in schema for part in objects_with_properties(entry)]
    if not isinstance(schema, dict):
        return []
    found = [part for entry in schema.values() for part in objects_with_properties(entry)]
    return [schema, *found] if schema.get("type") == "object" and "properties" in schema else found


def test_a_cell_has_the_same_keys_in_its_own_message_and_in_its_field() -> None:
    field_cell = load_schema("field")["properties"]["cells"]["items"]
    cell = load_schema("cell")
    for key, meaning in field_cell["properties"].items():
        assert cell["properties"][key] == meaning
    assert set(field_cell["required"]) <= set(cell["required"])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"ruo": False}, id="not for research only"),
        pytest.param({"extra": 1}, id="an unknown key"),
        pytest.param({"device": "Scope.1"}, id="a dot in a name"),
        pytest.param({"id": "scope-1:1"}, id="no seq in the id"),
        pytest.param({"captured_at": "2026-11-23T08:30:15Z"}, id="no milliseconds"),
        pytest.param({"captured_at": "2026-11-23T08:30:15.123+01:00"}, id="not UTC"),
        pytest.param({"duplicates": -1}, id="less than none"),
        pytest.param({"counts": {"round": 1.5}}, id="half a cell"),
    ],
)
def test_the_field_schema_refuses(change: dict[str, Any]) -> None:
    message = stamp(field_body(make_result(make_cell()), "scope-1", "lab-1", "s1"), "scope-1", 1, 1)
    check("field", message)
    with pytest.raises(jsonschema.ValidationError):
        check("field", {**message, **change})


# ---------------------------------------------------------------------------------------------------- field and cell


def test_a_field_message_has_the_shape_of_the_contract() -> None:
    cell = make_cell(slide_um=(1.234, 5.678), duplicate_of="s1-0", status=CellStatus.DUPLICATE)
    result = make_result(cell, frame={"um_per_px": 0.1, "stage_um": (100.0, 200.0)}, duplicates=1)
    heard = check("field", stamp(field_body(result, "scope-1", "lab-1", "s1"), "scope-1", 3, 9))
    assert heard["id"] == "scope-1:3:9"
    assert heard["seq"] == 9
    assert heard["sample"] == "s1"
    assert heard["captured_at"] == "2026-11-23T08:30:15.123Z"
    assert heard["captured_monotonic_ns"] == 123_456_789
    assert heard["clock"] == {"synchronised": True, "offset_ms": 0.25}
    assert heard["frame"] == {
        "n": 7,
        "sha256_16": "0123456789abcdef",
        "sha256": "0123456789abcdef" * 4,
        "width_px": 64,
        "height_px": 48,
        "um_per_px": 0.1,
        "stage_um": [100.0, 200.0],
        "focus": 123.46,
        "clipped_pct": 0.5,
        "colour": {"ground_rgb": [254.0, 228.0, 201.3], "stain_od_rgb": [0.15, 0.2, 0.1]},
    }
    assert heard["quality"] == {"accepted": True, "reasons": []}
    assert heard["cells"] == [
        {
            "cell_id": "s1-1",
            "box": [10.0, 20.1, 30.2, 40.8],
            "slide_um": [1.23, 5.68],
            "detector": {"class": "nucleated", "score": 0.9123},
            "class": "round",
            "probability": 0.9,
            "probabilities": {"round": 0.9, "lobed": 0.06, "grainy": 0.04},
            "margin": 0.84,
            "status": "duplicate",
            "duplicate_of": "s1-0",
        }
    ]
    assert heard["provenance"]["detector"] == {"name": "finder", "version": "1.0", "sha256": "a" * 64}
    assert heard["historical"] is False
    assert heard["ruo"] is True


def test_unknown_optional_keys_are_left_out_and_the_source_of_the_frame_is_never_told() -> None:
    message = stamp(field_body(make_result(make_cell()), "scope-1", "lab-1", "s1"), "scope-1", 1, 1)
    heard = check("field", message)
    assert "um_per_px" not in heard["frame"]
    assert "stage_um" not in heard["frame"]
    assert "slide_um" not in heard["cells"][0]
    assert "duplicate_of" not in heard["cells"][0]
    assert b"patient" not in serialise(message)


def test_a_cell_named_by_the_detector_alone_has_no_probabilities_and_no_margin() -> None:
    cell = make_cell(classification=None, class_name="disc", probability=0.87654)
    heard = check("field", stamp(field_body(make_result(cell), "scope-1", "lab-1", "s1"), "scope-1", 1, 1))
    assert heard["cells"][0]["probabilities"] == {}
    assert heard["cells"][0]["margin"] is None
    assert heard["cells"][0]["probability"] == 0.8765


def test_the_drafts_of_a_field_are_the_field_and_then_its_cells() -> None:
    result = make_result(make_cell(), make_cell(cell_id="s1-2"))
    field, *cells = field_drafts(result, TOPICS, "s1", with_cells=True)
    assert (field.stream, field.topic) == ("field", "hv/1/lab-1/scope-1/field/s1")
    assert [(cell.stream, cell.topic, cell.belongs_to) for cell in cells] == [
        ("cell", "hv/1/lab-1/scope-1/cell/s1", "field")
    ] * 2
    assert {draft.captured_monotonic_ns for draft in (field, *cells)} == {123_456_789}
    assert len(field_drafts(result, TOPICS, "s1", with_cells=False)) == 1


def test_a_cell_message_says_the_same_of_the_cell_as_the_field() -> None:
    result = make_result(make_cell(), make_cell(cell_id="s1-2", classification=None))
    field = check("field", stamp(field_body(result, "scope-1", "lab-1", "s1"), "scope-1", 2, 5))
    for n, body in enumerate(cell_bodies(result, "scope-1", "lab-1", "s1")):
        heard = check("cell", stamp({**body, "field_id": field["id"]}, "scope-1", 2, n + 1))
        assert heard["field_id"] == "scope-1:2:5"
        assert heard["frame"] == {"n": 7}
        assert heard["captured_at"] == field["captured_at"]
        assert {key: heard[key] for key in field["cells"][n]} == field["cells"][n]


def test_numpy_numbers_become_json_numbers() -> None:
    named = Classification("round", np.float32(0.75), {"round": np.float32(0.75), "lobed": np.float32(0.25)})
    box = Box(*np.array([1, 2, 3, 4], np.float32))
    cell = make_cell(
        detection=Detection(box, "nucleated", np.float32(0.5)), probability=np.float32(0.75), classification=named
    )
    result = make_result(cell, counts={"round": np.int64(1)}, duplicates=np.int32(0))
    check("field", stamp(field_body(result, "scope-1", "lab-1", "s1"), "scope-1", 1, 1))


def test_what_json_cannot_say_is_refused_by_the_name_of_the_topic() -> None:
    named = Classification("round", math.nan, {"round": math.nan, "lobed": 0.5})
    body = field_body(make_result(make_cell(probability=math.nan, classification=named)), "scope-1", "lab-1", "s1")
    with pytest.raises(MessageRejected, match="hv/1/lab-1/scope-1/field/s1"):
        serialise(stamp(body, "scope-1", 1, 1), "hv/1/lab-1/scope-1/field/s1")


@given(st.lists(st.floats(0.0, 1.0, allow_nan=False), min_size=1, max_size=12).filter(lambda weights: sum(weights) > 0))
def test_rounded_probabilities_keep_their_order_and_their_sum(weights: list[float]) -> None:
    exact = {f"c{n}": weight / sum(weights) for n, weight in enumerate(weights)}
    rounded = round_probabilities(exact)
    assert list(rounded) == list(exact)
    assert sum(rounded.values()) == pytest.approx(1, abs=1e-9)
    for name, value in rounded.items():
        assert 0 <= value <= 1
        assert abs(value - exact[name]) < 1e-4
        assert value == round(value, 4)
    in_order = [rounded[name] for name in sorted(exact, key=lambda name: (exact[name], rounded[name]))]
    assert in_order == sorted(in_order)


def test_the_class_of_a_cell_shows_one_and_the_same_probability_twice() -> None:
    third = 1 / 3
    named = Classification("a", third, {"a": third, "b": third, "c": third})
    cell = make_cell(class_name="a", probability=third, classification=named)
    heard = field_body(make_result(cell), "scope-1", "lab-1", "s1")["cells"][0]
    assert heard["probability"] == heard["probabilities"]["a"]


# -------------------------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize("state", AgentState)
def test_each_state_has_a_valid_message(state: AgentState) -> None:
    heard = check("state", state_body(state, boot=4, at=AT, **WHO))
    assert heard == {
        "schema": "hv/1/state",
        "state": state.value,
        "device": "scope-1",
        "site": "lab-1",
        "boot": 4,
        "at": "2026-11-23T08:30:15.123Z",
        "ruo": True,
    }


def test_info_tells_the_models_with_their_classes() -> None:
    heard = check(
        "info",
        info_body(
            boot=4,
            started_at=AT,
            agent_version="0.1.0",
            models=[DescribedModel("detector", DETECTOR, ("x", "y")), DescribedModel("classifier", CLASSIFIER, ("z",))],
            config_sha256="c" * 64,
            runtime="ai-edge-litert 2.3.0",
            delegate="xnnpack",
            **WHO,
        ),
    )
    assert heard["schema_version"] == 1
    assert heard["models"][0] == {
        "role": "detector",
        "name": "finder",
        "version": "1.0",
        "sha256": "a" * 64,
        "classes": ["x", "y"],
    }


def test_the_colours_of_a_field_are_told_as_red_green_blue() -> None:
    def told(**changes: Any) -> dict[str, Any]:
        body = field_body(make_result(make_cell(), **changes), "scope-1", "lab-1", "s1")
        frame: dict[str, Any] = check("field", stamp(body, "scope-1", 1, 1))["frame"]
        return frame

    assert told()["colour"] == {"ground_rgb": [254.0, 228.0, 201.3], "stain_od_rgb": [0.15, 0.2, 0.1]}
    bare = FrameQuality(True, (), 1.0, 0.0, FrameColour((200.0, 200.0, 200.0), None))
    assert told(quality=bare)["colour"]["stain_od_rgb"] is None
    assert "colour" not in told(quality=FrameQuality(True, (), 1.0, 0.0))


def test_a_field_that_joins_two_parts_says_where_the_other_one_lies() -> None:
    def told(**changes: Any) -> dict[str, Any]:
        place = SlidePlace("registered", 1, 0.26, 2.0, 0.0, 0.9, **changes)
        body = field_body(make_result(make_cell(), place=place), "scope-1", "lab-1", "s1")
        where: dict[str, Any] = check("field", stamp(body, "scope-1", 1, 1))["place"]
        return where

    here = {"source": "registered", "part": 1, "x_px": 0.3, "y_px": 2.0, "turn_deg": 0.0, "confidence": 0.9}
    assert told() == here
    there = {"part": 3, "x_px": 120.0, "y_px": -431.5, "turn_deg": 0.12}
    assert told(joins=JoinedPart(3, 120.04, -431.5, 0.123)) == {**here, "joins": there}


def test_health_of_a_machine_that_tells_nothing_is_null_and_not_left_out() -> None:
    reading = MachineReading(None, None, None, None, ClockReading(is_synchronised=False))
    heard = check(
        "health", health_body(make_snapshot(), reading, boot=4, at=AT, state=AgentState.READY, interval_s=30, **WHO)
    )
    for key in ("temperature_c", "throttling", "rss_bytes", "disk_free_bytes", "last_self_test", "drift", "restarts"):
        assert heard[key] is None
    assert heard["clock"] == {"synchronised": False, "offset_ms": None}
    assert heard["outbox"]["oldest_age_s"] is None


def test_health_of_a_talkative_machine_is_told_in_full() -> None:
    reading = MachineReading(61.25, Throttling(0x50001), 123_456, 789, ClockReading(True, 1.5))
    snapshot = make_snapshot(
        last_self_test=SelfTest(AT, True, "3 cells as expected"),
        drift=DriftReading(31, 30, {"focus": FigureReading(50.12346, 30.0, 40.0, 60.0, "thousandths", "it moved")}),
        outbox_depth=4,
        outbox_oldest_age_s=2.345,
    )
    heard = check(
        "health",
        health_body(
            snapshot,
            reading,
            boot=4,
            at=AT,
            state=AgentState.DEGRADED,
            interval_s=30,
            restarts=3,
            dead_letters=1,
            **WHO,
        ),
    )
    assert heard["temperature_c"] == 61.2
    assert heard["throttling"]["under_voltage"] is True
    assert heard["throttling"]["was_throttled"] is True
    assert heard["outbox"] == {"state": "ok", "detail": "", "depth": 4, "oldest_age_s": 2.3, "dead_letters": 1}
    assert heard["drift"] == {
        "slides": 31,
        "of_slides": 30,
        "figures": {
            "focus": {"usual": 50.1235, "now": 30.0, "low": 40.0, "high": 60.0, "unit": "thousandths", "moved": True}
        },
    }
    assert heard["timing_ms"] == {"detect": {"p50": 10.0, "p95": 20.0}}
    assert heard["last_self_test"] == {
        "at": "2026-11-23T08:30:15.123Z",
        "passed": True,
        "detail": "3 cells as expected",
    }


@pytest.mark.parametrize(
    "kind",
    [
        "camera-lost",
        "camera-regained",
        "frame-unreadable",
        "broker-rejected",
        "outbox-full",
        "outbox-recovered",
        "clock-step",
        "model-activated",
        "config-refused",
        "disk-low",
        "agent-started",
        "agent-stopping",
        "sample-opened",
        "sample-closed",
        "source-ended",
    ],
)
def test_each_kind_of_event_has_a_valid_message(kind: str) -> None:
    heard = check("event", stamp(event_body(kind, "it happened", at=AT, **WHO), "scope-1", 6, 2))
    assert heard["boot"] == 6
    assert heard["kind"] == kind
    assert heard["severity"] == "info"


def test_the_facts_of_an_event_become_plain_json_whatever_they_are() -> None:
    draft = event_draft(
        "frame-unreadable",
        "x" * 5000,
        TOPICS,
        at=AT,
        severity="warning",
        detail={"path": AT, "count": 3, "share": math.inf, "ratio": 0.5, "names": ("a", 1), "none": None},
    )
    heard = check("event", stamp(draft.body, "scope-1", 1, 1))
    assert heard["detail"] == {
        "path": "2026-11-23 08:30:15.123987+00:00",
        "count": 3,
        "share": None,
        "ratio": 0.5,
        "names": ["a", "1"],
        "none": None,
    }
    assert len(heard["message"]) == 2000


def test_a_file_name_that_is_no_text_does_not_break_the_message() -> None:
    body = event_body("frame-unreadable", "cannot read f\udcff.png", at=AT, **WHO)
    assert check("event", stamp(body, "scope-1", 1, 1))["message"] == "cannot read f?.png"


# ---------------------------------------------------------------------------------------------------- stamps and time


def test_a_stamp_can_be_put_on_any_body_and_again() -> None:
    body = {"schema": "hv/1/field", "device": "d", "x": 1}
    once = stamp(body, "d", 2, 3)
    assert once == {
        "schema": "hv/1/field",
        "id": "d:2:3",
        "seq": 3,
        "device": "d",
        "x": 1,
        "historical": False,
        "ruo": True,
    }
    assert stamp(once, "d", 2, 4)["id"] == message_id("d", 2, 4)


def test_historical_changes_that_one_word_and_nothing_else() -> None:
    message = stamp(field_body(make_result(make_cell()), "scope-1", "lab-1", "s1"), "scope-1", 1, 1)
    heard = json.loads(as_historical(serialise(message)))
    assert heard == {**message, "historical": True}
    assert as_historical(as_historical(serialise(message))) == as_historical(serialise(message))


def test_times_are_utc_with_milliseconds() -> None:
    berlin = timezone(timedelta(hours=1))
    assert rfc3339_ms(datetime(2026, 1, 1, 0, 30, tzinfo=berlin)) == "2025-12-31T23:30:00.000Z"
    with pytest.raises(ValueError, match="no time zone"):
        rfc3339_ms(datetime(2026, 1, 1))


@pytest.mark.parametrize("part", ["", "a.b", "A", "a/b", "+", "a" * 64, "ä"])
def test_a_topic_refuses_a_part_that_a_broker_would_take_apart(part: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in a topic"):
        Topics("lab-1", part)
    with pytest.raises(ValueError, match="cannot stand in a topic"):
        TOPICS.field(part)


@pytest.mark.parametrize(
    ("end", "name"),
    [("cmd/ping", "ping"), ("cmd/model.stage", "model.stage"), ("cmd/model/stage", "model.stage"), ("ack/x", None)],
)
def test_the_name_of_a_command_is_the_end_of_its_topic(end: str, name: str | None) -> None:
    assert TOPICS.command(f"{TOPICS.base}/{end}") == name


def test_a_draft_cannot_be_changed() -> None:
    draft = Draft("field", "t", {})
    with pytest.raises(AttributeError):
        draft.topic = "other"  # type: ignore[misc]
