"""From domain values to the bytes of the contract (`docs/contract.md`), one function for each kind of message.

    FieldResult --field_body--> body --Draft--> outbox --stamp--> message --serialise--> payload

A body lacks `id` and `seq`: these are given by the outbox in the transaction that stores it. `state`, `info` and
`health` are retained documents without a number; they never pass through the outbox.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import resources
from typing import Any, Literal

from agent.delivery.topics import CONTRACT_VERSION, Topics
from agent.domain import (
    AgentState,
    Attribute,
    Cell,
    ClockReading,
    DriftReading,
    FieldResult,
    FrameColour,
    JoinedPart,
    ModelIdentity,
    Provenance,
    SlidePlace,
)
from agent.errors import MessageRejected
from agent.health import HealthSnapshot, MachineReading

Body = dict[str, Any]
"""A message as it will stand in JSON."""

KINDS = (
    *("state", "info", "health", "field", "cell", "event"),
    *("sample", "differential", "alert", "audit", "reply"),
)
"""The kinds of message that a device sends."""

SCHEMAS = (*KINDS, "ack", "fleet")
"""The kinds that have a schema in `schemas/`: what receivers say to and of a device too."""

Severity = Literal["info", "warning", "error"]

LONGEST_TEXT = 2000
"""Characters of an event's message; a longer one (a library's whole complaint) is cut."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)

_FRESH = b'"historical":false,"ruo":true}'
_HISTORICAL = b'"historical":true,"ruo":true}'


@dataclass(frozen=True, slots=True)
class Draft:
    """A message that has no number yet.

    stream: what is numbered together: `field`, `cell`, `event`.
    belongs_to: a stream whose latest message in the same append this one is a part of; its id is put into the key
        `{belongs_to}_id` of the body.
    captured_monotonic_ns: when what it tells was seen; None = when it is appended.
    """

    stream: str
    topic: str
    body: Mapping[str, Any]
    belongs_to: str | None = None
    captured_monotonic_ns: int | None = None


@dataclass(frozen=True, slots=True)
class RetainedDocument:
    """The newest word on a retained topic, which outlives restarts. body: None = the topic is to be cleared."""

    topic: str
    body: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class DescribedModel:
    """A model as `info` tells of it. role: `detector` or `classifier`; classes: names in the order of its output."""

    role: str
    identity: ModelIdentity
    classes: Sequence[str]


# ---------------------------------------------------------------------------------------------- numbered messages


def field_body(result: FieldResult, device: str, site: str, sid: str, accession: str | None = None) -> Body:
    """The durable record of one accepted frame with all its cells. Unknown optional keys are left out."""
    frame = result.frame
    return {
        "schema": schema_name("field"),
        "device": device,
        "site": site,
        "sample": sid,
        **({} if accession is None else {"accession": accession}),
        "captured_at": rfc3339_ms(frame.captured_at),
        "captured_monotonic_ns": int(frame.captured_monotonic_ns),
        "clock": _clock_body(result.clock),
        "frame": {
            "n": int(frame.number),
            "sha256_16": frame.sha256_16,
            "sha256": frame.sha256,
            "width_px": frame.width_px,
            "height_px": frame.height_px,
            **({} if frame.um_per_px is None else {"um_per_px": _rounded(frame.um_per_px, 6)}),
            **({} if frame.stage_um is None else {"stage_um": _pair(frame.stage_um)}),
            "focus": _rounded(result.quality.focus, 2),
            "clipped_pct": _rounded(result.quality.clipped_pct, 3),
            **({} if result.quality.colour is None else {"colour": _colour_body(result.quality.colour)}),
        },
        "quality": {"accepted": bool(result.quality.is_accepted), "reasons": list(result.quality.reasons)},
        "timing_ms": {stage: _rounded(duration_ms, 2) for stage, duration_ms in result.timing_ms.items()},
        "counts": _counts(result.counts),
        "unique_counts": _counts(result.unique_counts),
        "duplicates": int(result.duplicates),
        **({} if result.place is None else {"place": _place_body(result.place)}),
        "cells": [_cell_keys(cell) for cell in result.cells],
        "provenance": _provenance_body(result.provenance),
    }


def cell_bodies(result: FieldResult, device: str, site: str, sid: str) -> tuple[Body, ...]:
    """The same cells one by one; the id of their field's message follows when they are stamped."""
    return tuple(
        {
            "schema": schema_name("cell"),
            "device": device,
            "site": site,
            "sample": sid,
            "field_id": None,
            "captured_at": rfc3339_ms(result.frame.captured_at),
            "frame": {"n": int(result.frame.number)},
            **_cell_keys(cell),
        }
        for cell in result.cells
    )


def event_body(
    kind: str,
    message: str,
    *,
    at: datetime,
    device: str,
    site: str,
    severity: Severity = "info",
    detail: Mapping[str, object] | None = None,
) -> Body:
    """Something that happened. kind: words with hyphens (`camera-lost`); message: for people; detail: flat facts."""
    return {
        "schema": schema_name("event"),
        "device": device,
        "site": site,
        "boot": None,
        "at": rfc3339_ms(at),
        "kind": kind,
        "severity": severity,
        "message": message[:LONGEST_TEXT] or kind,
        "detail": {key: _plain(value) for key, value in (detail or {}).items()},
    }


def field_drafts(
    result: FieldResult, topics: Topics, sid: str, *, with_cells: bool, accession: str | None = None
) -> tuple[Draft, ...]:
    """All that one frame says on MQTT: the field, then, if asked for, each of its cells."""
    captured_ns = int(result.frame.captured_monotonic_ns)
    field = Draft(
        "field",
        topics.field(sid),
        field_body(result, topics.device, topics.site, sid, accession),
        captured_monotonic_ns=captured_ns,
    )
    if not with_cells:
        return (field,)
    bodies = cell_bodies(result, topics.device, topics.site, sid)
    return (field, *(Draft("cell", topics.cell(sid), body, "field", captured_ns) for body in bodies))


def event_draft(
    kind: str,
    message: str,
    topics: Topics,
    *,
    at: datetime,
    severity: Severity = "info",
    detail: Mapping[str, object] | None = None,
) -> Draft:
    """An event, ready for the outbox."""
    body = event_body(kind, message, at=at, device=topics.device, site=topics.site, severity=severity, detail=detail)
    return Draft("event", topics.event, body)


def set_aside_draft(
    topics: Topics,
    *,
    at: datetime,
    reason: str,
    stream: str,
    name: str,
    topic: str,
    size_bytes: int,
    set_aside: int,
    kind: str = "broker-rejected",
) -> Draft:
    """The event about a message that was set aside. name: its id; set_aside: how many were since the last event."""
    detail = {
        "stream": stream,
        "message_id": name,
        "topic": topic,
        "bytes": size_bytes,
        "reason": reason,
        "set_aside": set_aside,
    }
    text = f"a message was set aside and not delivered: {reason}"
    return event_draft(kind, text, topics, at=at, severity="error", detail=detail)


def message_id(device: str, boot: int, seq: int) -> str:
    """The id of a numbered message; unique within its stream."""
    return f"{device}:{boot}:{seq}"


def stamp(body: Mapping[str, Any], device: str, boot: int, seq: int) -> Body:
    """The message: the body with its number, not historical. A key `boot` of the body is filled in."""
    rest = {key: value for key, value in body.items() if key not in ("schema", "id", "seq", "historical", "ruo")}
    if "boot" in rest:
        rest["boot"] = boot
    return {
        "schema": body["schema"],
        "id": message_id(device, boot, seq),
        "seq": seq,
        **rest,
        # Last, and in this order: `as_historical` changes the end of the payload without reading the rest.
        "historical": False,
        "ruo": True,
    }


def serialise(message: Mapping[str, Any], topic: str = "") -> bytes:
    """One line of UTF-8 JSON. Raises MessageRejected for what JSON cannot say (not a number, infinity)."""
    try:
        text = _ENCODER.encode(message)
    except (TypeError, ValueError) as error:
        raise MessageRejected(topic, f"it cannot be written as JSON: {error}") from error
    # Names of files may hold bytes that are no text (lone surrogates); they become `?`, the message stays valid.
    return text.encode("utf-8", errors="replace")


def as_historical(payload: bytes) -> bytes:
    """The same stamped message with `historical: true`."""
    if not payload.endswith(_FRESH):
        return payload
    return payload[: -len(_FRESH)] + _HISTORICAL


# --------------------------------------------------------------------------------------------- retained documents


def state_body(state: AgentState, *, device: str, site: str, boot: int, at: datetime) -> Body:
    """How the agent is. at: since when; in the Will (`lost`), when the connection was made that was lost."""
    return {
        "schema": schema_name("state"),
        "state": state.value,
        "device": device,
        "site": site,
        "boot": boot,
        "at": rfc3339_ms(at),
        "ruo": True,
    }


def info_body(
    *,
    device: str,
    site: str,
    boot: int,
    started_at: datetime,
    agent_version: str,
    models: Iterable[DescribedModel],
    config_sha256: str,
    runtime: str,
    delegate: str,
    numbered_since_boot: int | None = None,
    capabilities: Iterable[str] = (*KINDS, "image", "cmd"),
) -> Body:
    """The birth certificate: who counts here, with which models.

    numbered_since_boot: in which boot the outbox of now began at number 1; None = not known. capabilities: what this
    agent does, as words.
    """
    return {
        "schema": schema_name("info"),
        "schema_version": CONTRACT_VERSION,
        "device": device,
        "site": site,
        "boot": boot,
        "numbered_since_boot": numbered_since_boot,
        "started_at": rfc3339_ms(started_at),
        "agent": agent_version,
        "models": [
            {"role": model.role, **_model_body(model.identity), "classes": list(model.classes)} for model in models
        ],
        "config_sha256": config_sha256,
        "runtime": runtime,
        "delegate": delegate,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "capabilities": list(capabilities),
        "ruo": True,
    }


def health_body(
    snapshot: HealthSnapshot,
    machine: MachineReading,
    *,
    device: str,
    site: str,
    boot: int,
    at: datetime,
    state: AgentState,
    interval_s: float,
    restarts: int | None = None,
    dead_letters: int | None = None,
    certificate_days_left: float | None = None,
) -> Body:
    """The numbers by which the agent is watched. What this machine cannot tell is null, never left out."""
    throttling = machine.throttling
    self_test = snapshot.last_self_test
    return {
        "schema": schema_name("health"),
        "device": device,
        "site": site,
        "boot": boot,
        "at": rfc3339_ms(at),
        "interval_s": _rounded(interval_s, 3),
        "state": state.value,
        "uptime_s": _rounded(snapshot.uptime_s, 1),
        "restarts": restarts,
        "fields": int(snapshot.fields),
        "fields_per_min": _rounded(snapshot.fields_per_min, 2),
        "dropped": _counts(snapshot.dropped),
        "timing_ms": {
            stage: {"p50": _rounded(timing.p50_ms, 2), "p95": _rounded(timing.p95_ms, 2)}
            for stage, timing in snapshot.timings.items()
        },
        "camera": {"state": snapshot.camera, "detail": snapshot.camera_detail[:LONGEST_TEXT]},
        "broker": {"state": snapshot.broker, "detail": snapshot.broker_detail[:LONGEST_TEXT]},
        "outbox": {
            "state": snapshot.outbox,
            "detail": snapshot.outbox_detail[:LONGEST_TEXT],
            "depth": int(snapshot.outbox_depth),
            "oldest_age_s": _rounded_or_none(snapshot.outbox_oldest_age_s, 1),
            "dead_letters": dead_letters,
        },
        "certificate_days_left": _rounded_or_none(certificate_days_left, 1),
        "temperature_c": _rounded_or_none(machine.temperature_c, 1),
        "throttling": None
        if throttling is None
        else {
            "bits": throttling.bits,
            "under_voltage": throttling.is_under_voltage,
            "throttled": throttling.is_throttled,
            "was_under_voltage": throttling.was_under_voltage,
            "was_throttled": throttling.was_throttled,
        },
        "rss_bytes": machine.rss_bytes,
        "disk_free_bytes": machine.disk_free_bytes,
        "clock": _clock_body(machine.clock),
        "last_self_test": None
        if self_test is None
        else {
            "at": rfc3339_ms(self_test.at),
            "passed": self_test.is_passed,
            "detail": self_test.detail[:LONGEST_TEXT],
        },
        "drift": None if snapshot.drift is None else _drift_body(snapshot.drift),
        "ruo": True,
    }


# ----------------------------------------------------------------------------------------------------- the schemas


def schema_name(kind: str) -> str:
    """The value of the key `schema` in messages of this kind."""
    return f"hv/{CONTRACT_VERSION}/{kind}"


def load_schema(kind: str) -> Body:
    """The JSON Schema (2020-12) of one kind of message."""
    text = (resources.files("agent.delivery") / "schemas" / f"{kind}.json").read_text("utf-8")
    schema: Body = json.loads(text)
    return schema


# ------------------------------------------------------------------------------------------------------- the parts


def rfc3339_ms(at: datetime) -> str:
    """A UTC time with milliseconds and Z. Raises ValueError for a time that does not know its zone."""
    if at.tzinfo is None:
        raise ValueError(f"{at.isoformat()} has no time zone")
    return at.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _cell_keys(cell: Cell) -> Body:
    box, named = cell.detection.box, cell.classification
    probabilities = {} if named is None else round_probabilities(named.probabilities)
    probability = _rounded(cell.probability, 4)
    if named is not None and math.isclose(cell.probability, named.probability, abs_tol=1e-6):
        probability = probabilities.get(cell.class_name, probability)  # one number, not two that differ in a digit
    return {
        "cell_id": cell.cell_id,
        "box": [_rounded(edge, 1) for edge in (box.x_min, box.y_min, box.x_max, box.y_max)],
        **({} if cell.slide_um is None else {"slide_um": _pair(cell.slide_um)}),
        "detector": {"class": cell.detection.class_name, "score": _rounded(cell.detection.score, 4)},
        "class": cell.class_name,
        "probability": probability,
        "probabilities": probabilities,
        "margin": None if named is None else _rounded(named.margin, 4),
        **({"morphology": morphology_body(named.morphology)} if named is not None and named.morphology else {}),
        "status": cell.status.value,
        **({} if cell.duplicate_of is None else {"duplicate_of": cell.duplicate_of}),
        **({} if cell.is_counted is None else {"counted": cell.is_counted}),
        **({"supersedes": list(cell.supersedes)} if cell.supersedes else {}),
    }


def morphology_body(morphology: Mapping[str, Attribute]) -> Body:
    """The attributes of a cell as they stand in JSON."""
    return {name: {"value": a.value, "probability": _rounded(a.probability, 4)} for name, a in morphology.items()}


def round_probabilities(probabilities: Mapping[str, float]) -> dict[str, float]:
    """Four decimals that keep the sum and never swap two classes (largest remainders are rounded up)."""
    scaled = {name: float(value) * 10_000 for name, value in probabilities.items()}
    if not all(math.isfinite(value) for value in scaled.values()):
        return {name: float(value) for name, value in probabilities.items()}  # `serialise` refuses it by name
    units = {name: math.floor(value) for name, value in scaled.items()}
    missing = round(sum(scaled.values())) - sum(units.values())
    by_remainder = sorted(scaled, key=lambda name: scaled[name] - units[name], reverse=True)
    for name in by_remainder[:missing]:
        units[name] += 1
    return {name: unit / 10_000 for name, unit in units.items()}


def _provenance_body(provenance: Provenance) -> Body:
    return {
        "agent": provenance.agent_version,
        **models_body(provenance.detector, provenance.classifier),
        "runtime": provenance.runtime,
        "delegate": provenance.delegate,
        "config_sha256": provenance.config_sha256,
        **({} if provenance.software is None else {"software": asdict(provenance.software)}),
        **({} if provenance.thresholds is None else {"thresholds": asdict(provenance.thresholds)}),
    }


def models_body(detector: ModelIdentity, classifier: ModelIdentity) -> Body:
    """Which models named a cell."""
    return {"detector": _model_body(detector), "classifier": _model_body(classifier)}


def _model_body(identity: ModelIdentity) -> Body:
    return {"name": identity.name, "version": identity.version, "sha256": identity.sha256}


def model_words(identity: ModelIdentity) -> str:
    """A model in one line: name, version and the first digits of its digest."""
    return f"{identity.name} {identity.version} ({identity.sha256[:16]})"


def _place_body(place: SlidePlace) -> Body:
    joins = place.joins
    return {
        "source": place.source,
        "part": int(place.part),
        **({} if place.source == "unknown" else _where_body(place)),
        "confidence": _rounded(min(1.0, max(0.0, place.confidence)), 3),
        **({} if joins is None else {"joins": {"part": int(joins.part), **_where_body(joins)}}),
    }


def _where_body(place: SlidePlace | JoinedPart) -> Body:
    return {"x_px": _rounded(place.x_px, 1), "y_px": _rounded(place.y_px, 1), "turn_deg": _rounded(place.turn_deg, 2)}


def _colour_body(colour: FrameColour) -> Body:
    """In the order R, G, B, as people and browsers say it."""
    return {
        "ground_rgb": [_rounded(level, 1) for level in reversed(colour.ground_bgr)],
        "stain_od_rgb": None
        if colour.stain_od_bgr is None
        else [_rounded(density, 4) for density in reversed(colour.stain_od_bgr)],
    }


def _drift_body(reading: DriftReading) -> Body:
    return {
        "slides": reading.slides,
        "of_slides": reading.of_slides,
        "figures": {
            name: {
                "usual": _rounded(figure.usual, 4),
                "now": _rounded(figure.now, 4),
                "low": _rounded(figure.low, 4),
                "high": _rounded(figure.high, 4),
                "unit": figure.unit,
                "moved": figure.moved is not None,
            }
            for name, figure in reading.figures.items()
        },
    }


def _clock_body(clock: ClockReading) -> Body:
    return {"synchronised": bool(clock.is_synchronised), "offset_ms": _rounded_or_none(clock.offset_ms, 3)}


def _counts(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: int(count) for name, count in counts.items()}


def _pair(place_um: tuple[float, float]) -> list[float]:
    return [_rounded(place_um[0], 2), _rounded(place_um[1], 2)]


def _rounded(value: float, digits: int) -> float:
    """A plain float (numpy's own kinds are not JSON); -0.0 becomes 0.0."""
    return round(float(value), digits) + 0.0


def _rounded_or_none(value: float | None, digits: int) -> float | None:
    return None if value is None else _rounded(value, digits)


def _plain(value: object) -> object:
    """A fact that JSON can say; everything else becomes its text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [str(part) for part in value]
    return str(value)
