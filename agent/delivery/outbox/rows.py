"""A row: what is stored of one message, how it is known to be as it was stored, and how old it is."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

STREAMS = ("field", "cell", "event", "audit", "differential")
"""Kinds of messages; each is numbered for itself."""

WAITING, KEPT, ASKED = 0, 1, 2
"""States of a row: not confirmed; confirmed and kept as history; history that is to be sent again."""

NUMBERED_COLUMNS = "stream, boot, seq, topic, captured_monotonic_ns, appended_unix_s, payload, crc32"
"""What a waiting row and a dead letter have in common, in the order of `NumberedRow.columns`."""

ROW_COLUMNS = "row_id, stream, boot, seq, topic, captured_monotonic_ns, payload, crc32"
"""What `read_row` takes."""

PUBLISH_PROPERTIES_BYTES = 22
"""MQTT 5 properties of a row's PUBLISH with their length: payload format, content type `application/json`."""


@dataclass(frozen=True, slots=True)
class NumberedRow:
    """A message with its number, as it is stored; crc32: the checksum over topic and payload."""

    stream: str
    boot: int
    seq: int
    topic: str
    captured_monotonic_ns: int
    appended_unix_s: float
    payload: bytes
    crc32: int

    @property
    def columns(self) -> tuple[Any, ...]:
        """The values of NUMBERED_COLUMNS."""
        return (
            *(self.stream, self.boot, self.seq, self.topic),
            *(self.captured_monotonic_ns, self.appended_unix_s, self.payload, self.crc32),
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One stored message. row_id: its place in the order of sending. is_intact: the payload is what was stored.

    is_replay: it was confirmed before and is asked for again.
    """

    row_id: int
    stream: str
    boot: int
    seq: int
    topic: str
    captured_monotonic_ns: int
    payload: bytes
    is_intact: bool = True
    is_replay: bool = False


@dataclass(frozen=True, slots=True)
class Clocks:
    """Rows of this boot are dated by the clock that nobody sets, older ones by the wall clock."""

    boot: int
    monotonic_ns: Callable[[], int]
    unix_time: Callable[[], float]

    def age_s(self, boot: object, captured_ns: object, appended_unix_s: object) -> float | None:
        """s; how old a row is, by the clock that nobody sets if it is of this boot; None: the disk has changed it."""
        if not (isinstance(captured_ns, int) and isinstance(appended_unix_s, (int, float))):
            return None
        if boot == self.boot:
            return max(0.0, (self.monotonic_ns() - captured_ns) / 1e9)
        return max(0.0, self.unix_time() - appended_unix_s)

    def now_text(self) -> str:
        """The time of day, UTC, to the second."""
        return datetime.fromtimestamp(self.unix_time(), timezone.utc).isoformat(timespec="seconds")


def read_row(columns: Sequence[Any], *, is_replay: bool = False) -> Row:
    """A row as it stands there, whatever the disk has made of its columns. columns: ROW_COLUMNS."""
    row_id, stream, boot, seq, topic, captured_ns, payload, crc32 = columns
    is_intact = isinstance(topic, str) and isinstance(payload, bytes) and checksum(topic, payload) == crc32
    numbers = [value if isinstance(value, int) else 0 for value in (boot, seq, captured_ns)]
    payload = payload if isinstance(payload, bytes) else str(payload).encode()
    return Row(row_id, str(stream), numbers[0], numbers[1], str(topic), numbers[2], payload, is_intact, is_replay)


def checksum(topic: str, payload: bytes) -> int:
    """CRC-32 over topic and payload, stored with every row."""
    return zlib.crc32(payload, zlib.crc32(topic.encode()))


def publish_bytes(topic: str, payload: bytes) -> int:
    """How long the PUBLISH packet of a row is with MQTT 5."""
    rest = 2 + len(topic.encode()) + 2 + PUBLISH_PROPERTIES_BYTES + len(payload)
    return 1 + (1 if rest < 128 else 2 if rest < 16_384 else 3 if rest < 2_097_152 else 4) + rest


def export_line(number: int, topic: str, payload: bytes, **more: str) -> str:
    """One message as a line of JSON; a payload that is none, as text."""
    try:
        message: Any = json.loads(payload)
    except ValueError:
        message = payload.decode("utf-8", errors="replace")
    return json.dumps({"row": number, "topic": topic, **more, "message": message}, ensure_ascii=False)
