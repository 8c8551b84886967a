"""From a topic and the bytes on it to a message that can be stored, or the reason why it cannot.

    topic, payload --read_message--> Message | MessageUnusable --> store.py

Reads the keys that it knows and passes over those that it does not, as the contract asks of a subscriber: a newer agent
may say more. The whole message is kept beside the columns, so nothing of it is lost.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from agent.delivery.topics import CONTRACT_VERSION
from agent.errors import MessageRejected

NUMBERED = frozenset({"field", "cell", "event", "audit", "differential"})
"""Streams whose messages carry `id` and `seq`. Of `differential` only the final ones do."""

DOCUMENTS = frozenset({"state", "info", "health", "sample", "alert", "differential"})
"""Retained topics of which only the newest word counts."""

LARGEST_NUMBER = 2**53
"""Numbers up to here are exact in every reader of JSON; a real device needs centuries to get there."""

_PART = re.compile(r"[a-z0-9-]{1,63}")
_ID = re.compile(r"([a-z0-9-]{1,63}):([0-9]{1,16}):([0-9]{1,16})")
_ID_IN_BYTES = re.compile(rb'"id"\s*:\s*"([a-z0-9-]{1,63}:[0-9]{1,16}:[0-9]{1,16})"')
_ZERO_BYTE = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_LONGEST_REASON = 500


class MessageUnusable(MessageRejected):
    """Goes to the dead letters. place, number: as far as they could be made out, else None."""

    def __init__(self, topic: str, reason: str, *, place: Place | None = None, number: Number | None = None) -> None:
        super().__init__(topic, reason[:_LONGEST_REASON])
        self.place = place
        self.number = number


@dataclass(frozen=True, slots=True)
class Number:
    """The place of a message in its stream."""

    stream: str
    boot: int
    seq: int


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Which device."""

    site: str
    device: str

    @property
    def base(self) -> str:
        return f"hv/{CONTRACT_VERSION}/{self.site}/{self.device}"

    def __str__(self) -> str:
        return f"{self.site}/{self.device}"


def _in_utc(at: datetime) -> datetime:
    try:
        return at.astimezone(timezone.utc)
    except OverflowError:
        raise ValueError("a time outside the years 1 to 9999") from None


Time = Annotated[AwareDatetime, AfterValidator(_in_utc)]
Identifier = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,63}$")]
Whole = Annotated[int, Field(ge=0, le=LARGEST_NUMBER)]
Signed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Pair = tuple[float, float]


class Part(BaseModel):
    """A part of a message: the keys that have a column; all others are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, populate_by_name=True)


class Named(Part):
    class_name: Annotated[str, Field(alias="class")]
    score: float | None = None


class CellPart(Part):
    cell_id: Annotated[str, Field(min_length=1, max_length=200)]
    box: tuple[float, float, float, float]
    detector: Named
    class_name: Annotated[str, Field(alias="class")]
    probability: float | None = None
    probabilities: dict[str, float] = {}
    margin: float | None = None
    status: str
    duplicate_of: str | None = None
    slide_um: Pair | None = None
    morphology: dict[str, Any] | None = None


class ClockPart(Part):
    synchronised: bool | None = None
    offset_ms: float | None = None


class FramePart(Part):
    n: Whole
    sha256_16: str | None = None
    width_px: Whole | None = None
    height_px: Whole | None = None
    um_per_px: float | None = None
    stage_um: Pair | None = None
    focus: float | None = None
    clipped_pct: float | None = None
    exposure_us: float | None = None


class ModelPart(Part):
    name: str = ""
    version: str = ""


class ProvenancePart(Part):
    agent: str | None = None
    detector: ModelPart = ModelPart()
    classifier: ModelPart = ModelPart()
    runtime: str | None = None
    delegate: str | None = None
    config_sha256: str | None = None


class FieldMessage(Part):
    sample: Identifier
    accession: str | None = None
    captured_at: Time
    captured_monotonic_ns: Signed | None = None
    clock: ClockPart = ClockPart()
    frame: FramePart
    counts: dict[str, Whole] = {}
    unique_counts: dict[str, Signed] = {}
    duplicates: Whole = 0
    cells: list[CellPart]
    timing_ms: dict[str, float] = {}
    provenance: ProvenancePart = ProvenancePart()
    historical: bool = False


class CellMessage(CellPart):
    sample: Identifier
    field_id: str | None = None
    captured_at: Time


class EventMessage(Part):
    at: Time
    kind: str
    severity: str = "info"
    message: str = ""
    detail: dict[str, Any] = {}
    historical: bool = False


class AuditMessage(Part):
    at: Time
    action: str
    outcome: str | None = None
    by: str | None = None
    message: str | None = None


class StateMessage(Part):
    state: str
    boot: Whole
    at: Time


class InfoMessage(Part):
    boot: Whole
    numbered_since_boot: Whole | None = None
    agent: str | None = None
    started_at: Time | None = None


class HealthMessage(Part):
    boot: Whole
    at: Time


class SampleMessage(Part):
    boot: Whole
    phase: str
    accession: str | None = None
    age_band: str | None = None
    opened_at: Time | None = None
    ended_at: Time | None = None
    end_reason: str | None = None


class AlertMessage(Part):
    since: Time
    severity: str = "warning"
    message: str = ""


class SharePart(Part):
    class_name: Annotated[str, Field(alias="class")]
    count: Whole = 0
    pct: float | None = None
    low_pct: float | None = None
    high_pct: float | None = None
    flag: str | None = None


class DifferentialMessage(Part):
    sample: Identifier
    boot: Whole
    at: Time
    status: str
    report: str | None = None
    leukocytes: Whole | None = None
    shares: list[SharePart] = []


class ReplyMessage(Part):
    status: str
    code: str = ""
    message: str = ""
    transaction: str | None = None
    data: dict[str, Any] = {}


_PARTS: dict[str, type[Part]] = {
    "field": FieldMessage,
    "cell": CellMessage,
    "event": EventMessage,
    "audit": AuditMessage,
    "state": StateMessage,
    "info": InfoMessage,
    "health": HealthMessage,
    "sample": SampleMessage,
    "alert": AlertMessage,
    "differential": DifferentialMessage,
    "reply": ReplyMessage,
}


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One message. about: the topic's words after its kind (sample, alert id). number: None for documents.

    part: the keys that have columns; None where the retained topic was cleared (empty payload).
    body: the whole message as it was sent; None with an empty payload.
    """

    place: Place
    kind: str
    about: tuple[str, ...]
    number: Number | None
    part: Part | None
    body: dict[str, Any] | None
    payload: bytes
    is_retained: bool

    @property
    def is_cleared(self) -> bool:
        return not self.payload


def read_message(topic: str, payload: bytes, *, is_retained: bool) -> Message:
    """The message of a topic below `hv/1/{site}/{device}`. Raises MessageUnusable with the reason."""
    place, kind, about = _read_topic(topic)
    if not payload and kind in DOCUMENTS:
        return Message(place, kind, about, None, None, None, payload, is_retained)
    try:
        body = _read_json(payload)
    except ValueError as error:
        number = _salvaged_number(place, kind, payload)
        raise MessageUnusable(topic, f"no JSON object: {error}", place=place, number=number) from None
    number = _read_number(topic, place, kind, body)
    try:
        part = _PARTS[kind].model_validate(body)
    except ValidationError as error:
        reason = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5])
        raise MessageUnusable(topic, f"not as the contract has it: {reason}", place=place, number=number) from None
    if about and getattr(part, "sample", None) not in (None, about[0]):
        reason = f"its topic is about the sample {about[0]}, its content about {getattr(part, 'sample', None)}"
        raise MessageUnusable(topic, reason, place=place, number=number)
    return Message(place, kind, about, number, part, body, payload, is_retained)


def _read_topic(topic: str) -> tuple[Place, str, tuple[str, ...]]:
    parts = topic.split("/")
    if len(parts) < 5 or parts[:2] != ["hv", str(CONTRACT_VERSION)]:
        raise MessageUnusable(topic, f"no topic below hv/{CONTRACT_VERSION}/site/device")
    if not all(_PART.fullmatch(part) for part in parts[2:]):
        raise MessageUnusable(topic, "a part of the topic is not 1 to 63 of a-z, 0-9 and hyphen")
    place, kind, about = Place(parts[2], parts[3]), parts[4], tuple(parts[5:])
    if kind not in _PARTS:
        raise MessageUnusable(topic, f"messages on {kind!r} are not known here", place=place)
    wanted = 1 if kind in ("field", "cell", "sample", "differential", "alert", "reply") else 0
    if len(about) != wanted:
        raise MessageUnusable(topic, f"{wanted} words are allowed after {kind!r}, found {len(about)}", place=place)
    return place, kind, about


def _read_json(payload: bytes) -> dict[str, Any]:
    """The object, made sure that a database can keep it: no NaN, no zero byte, no half of a surrogate pair."""
    try:
        body = json.loads(payload.decode("utf-8"))
        text = json.dumps(body, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(body, dict):
        raise ValueError(f"found {type(body).__name__}")  # noqa: TRY004 - the sender's fault, not the caller's
    if "\\u0000" in text and _ZERO_BYTE.search(text):
        raise ValueError("a text holds a zero byte")
    return body


def _read_number(topic: str, place: Place, kind: str, body: dict[str, Any]) -> Number | None:
    if kind not in NUMBERED:
        return None
    if "id" not in body:
        if kind in DOCUMENTS:
            return None
        raise MessageUnusable(topic, "id: missing", place=place)
    found = _ID.fullmatch(body["id"]) if isinstance(body["id"], str) else None
    if found is None:
        raise MessageUnusable(topic, "id: not device:boot:seq", place=place)
    if found[1] != place.device:
        raise MessageUnusable(topic, f"id: of the device {found[1]}, on the topic of {place.device}", place=place)
    number = _number(kind, found[2], found[3])
    if number is None or body.get("seq", number.seq) != number.seq:
        raise MessageUnusable(topic, "id and seq: do not agree, or out of range", place=place)
    return number


def _salvaged_number(place: Place, kind: str, payload: bytes) -> Number | None:
    """The number of a message whose JSON is broken, so that it is not asked for again and again."""
    found = _ID_IN_BYTES.search(payload) if kind in NUMBERED else None
    device, boot, seq = found[1].decode().split(":") if found else ("", "", "")
    return _number(kind, boot, seq) if device == place.device else None


def _number(stream: str, boot: str, seq: str) -> Number | None:
    number = Number(stream, int(boot), int(seq))
    return number if number.boot <= LARGEST_NUMBER and 1 <= number.seq <= LARGEST_NUMBER else None
