"""The schema, for people as much as for programs: every table names site and device, so most questions need no join.

Times are UTC: `timestamptz` in PostgreSQL; in SQLite text like `2026-11-23T08:30:15.123Z`, which sorts as it should.
`body` is the message as it came, with the keys that have no column. How the tables hang together is drawn in
docs/central.md; a change here needs a migration in `migrations/versions` (a test compares the two).
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.types import JSON, TypeDecorator, TypeEngine


class UtcTime(TypeDecorator[datetime]):
    """A point in time, to the millisecond in SQLite."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return TIMESTAMP(timezone=True) if dialect.name == "postgresql" else Text()

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None or dialect.name == "postgresql":
            return value
        # isoformat pads the year to four digits on every platform, strftime does not.
        return value.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ARG002 - SQLAlchemy's signature
        if value is None or isinstance(value, datetime):
            return None if value is None else value.astimezone(timezone.utc)
        return datetime.fromisoformat(str(value).replace("Z", "+00:00"))


Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Counter = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite numbers rows by itself only in a column of the type INTEGER."""

metadata = MetaData()


def _device() -> list[Column[Any]]:
    return [Column("site", Text, primary_key=True), Column("device", Text, primary_key=True)]


def _number() -> list[Column[Any]]:
    return [
        *_device(),
        Column("boot", BigInteger, primary_key=True),
        Column("seq", BigInteger, primary_key=True),
    ]


devices = Table(
    "devices",
    metadata,
    *_device(),
    Column("first_seen_at", UtcTime, nullable=False),
    Column("last_seen_at", UtcTime, nullable=False),
    Column("boot", BigInteger),
    Column("state", Text),
    Column("state_at", UtcTime),
    Column("agent", Text),
    Column("info", Json),
    Column("health", Json),
    Column("health_at", UtcTime),
    # Goes up with every batch that touches the device: a collector knows by it whether its memory still holds.
    Column("version", BigInteger, nullable=False),
)

samples = Table(
    "samples",
    metadata,
    *_device(),
    Column("sample", Text, primary_key=True),
    Column("phase", Text),
    Column("accession", Text),
    Column("age_band", Text),
    Column("opened_at", UtcTime),
    Column("ended_at", UtcTime),
    Column("end_reason", Text),
    Column("boot", BigInteger),
    Column("body", Json),
    Column("updated_at", UtcTime, nullable=False),
)

fields = Table(
    "fields",
    metadata,
    *_number(),
    Column("sample", Text, nullable=False),
    Column("accession", Text),
    Column("captured_at", UtcTime, nullable=False),
    Column("captured_monotonic_ns", BigInteger),
    Column("received_at", UtcTime, nullable=False),
    Column("clock_synchronised", Boolean),
    Column("clock_offset_ms", Double),
    Column("frame_n", BigInteger),
    Column("frame_sha256_16", Text),
    Column("width_px", BigInteger),
    Column("height_px", BigInteger),
    Column("um_per_px", Double),
    Column("stage_x_um", Double),
    Column("stage_y_um", Double),
    Column("focus", Double),
    Column("clipped_pct", Double),
    Column("total_ms", Double),
    Column("counts", Json, nullable=False),
    Column("unique_counts", Json, nullable=False),
    Column("duplicates", BigInteger, nullable=False),
    Column("cell_count", BigInteger, nullable=False),
    Column("agent", Text),
    Column("detector", Text),
    Column("classifier", Text),
    Column("config_sha256", Text),
    Column("historical", Boolean, nullable=False),
    Column("body", Json, nullable=False),
    Index("fields_by_sample", "site", "device", "sample", "seq"),
    Index("fields_by_time", "captured_at"),
)

cells = Table(
    "cells",
    metadata,
    *_device(),
    Column("cell_id", Text, primary_key=True),
    Column("sample", Text, nullable=False),
    # The number of the field that it was seen in; joins to fields.
    Column("boot", BigInteger),
    Column("seq", BigInteger),
    Column("captured_at", UtcTime, nullable=False),
    Column("class", Text, nullable=False),
    Column("probability", Double),
    Column("margin", Double),
    Column("status", Text, nullable=False),
    Column("duplicate_of", Text),
    Column("x_min_px", Double, nullable=False),
    Column("y_min_px", Double, nullable=False),
    Column("x_max_px", Double, nullable=False),
    Column("y_max_px", Double, nullable=False),
    Column("slide_x_um", Double),
    Column("slide_y_um", Double),
    Column("detector_class", Text, nullable=False),
    Column("detector_score", Double),
    Column("probabilities", Json, nullable=False),
    Column("morphology", Json),
    Index("cells_by_sample", "site", "device", "sample", "class"),
    Index("cells_by_field", "site", "device", "boot", "seq"),
    Index("cells_by_time", "captured_at"),
)

differentials = Table(
    "differentials",
    metadata,
    Column("differential_id", Counter, primary_key=True, autoincrement=True),
    Column("site", Text, nullable=False),
    Column("device", Text, nullable=False),
    Column("sample", Text, nullable=False),
    # Of the final and amended ones; a running one has no number, and there is one for each sample, the newest.
    Column("boot", BigInteger),
    Column("seq", BigInteger),
    Column("status", Text, nullable=False),
    Column("report", Text),
    Column("at", UtcTime, nullable=False),
    Column("received_at", UtcTime, nullable=False),
    Column("leukocytes", BigInteger),
    Column("body", Json, nullable=False),
    UniqueConstraint("site", "device", "boot", "seq", name="differentials_number"),
    Index("differentials_by_sample", "site", "device", "sample"),
)

differential_shares = Table(
    "differential_shares",
    metadata,
    Column("differential_id", Counter, primary_key=True, autoincrement=False),
    Column("class", Text, primary_key=True),
    Column("count", BigInteger, nullable=False),
    # % of the classified leukocytes, with its 95 % interval.
    Column("pct", Double),
    Column("low_pct", Double),
    Column("high_pct", Double),
    Column("flag", Text),
)

events = Table(
    "events",
    metadata,
    *_number(),
    Column("at", UtcTime, nullable=False),
    Column("received_at", UtcTime, nullable=False),
    Column("kind", Text, nullable=False),
    Column("severity", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("detail", Json, nullable=False),
    Column("historical", Boolean, nullable=False),
    Column("body", Json, nullable=False),
    Index("events_by_time", "at"),
)

audit = Table(
    "audit",
    metadata,
    *_number(),
    Column("at", UtcTime, nullable=False),
    Column("received_at", UtcTime, nullable=False),
    Column("action", Text, nullable=False),
    Column("outcome", Text),
    Column("asked_by", Text),
    Column("message", Text),
    # The chain of hashes is over this; see `hematovision audit`.
    Column("body", Json, nullable=False),
)

alerts = Table(
    "alerts",
    metadata,
    *_device(),
    Column("alert", Text, primary_key=True),
    Column("since", UtcTime, nullable=False),
    # null = an open problem.
    Column("cleared_at", UtcTime),
    Column("severity", Text),
    Column("message", Text),
    Column("body", Json),
)

# ----------------------------------------------------------------------------------------- what has arrived, what not

received = Table(
    "received",
    metadata,
    *_device(),
    Column("stream", Text, primary_key=True),
    Column("boot", BigInteger, primary_key=True),
    Column("first_seq", BigInteger, primary_key=True),
    Column("last_seq", BigInteger, nullable=False),
)

acks = Table(
    "acks",
    metadata,
    *_device(),
    Column("stream", Text, primary_key=True),
    # Numbers began at 1 under this boot; see numbers.py.
    Column("since_boot", BigInteger, primary_key=True),
    # Every number up to here has arrived or is gone for good.
    Column("complete_seq", BigInteger, nullable=False),
    # What the device is told: the highest message that arrived up to there.
    Column("boot", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("highest_seq", BigInteger, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
)

gaps = Table(
    "gaps",
    metadata,
    Column("gap_id", Counter, primary_key=True, autoincrement=True),
    Column("site", Text, nullable=False),
    Column("device", Text, nullable=False),
    Column("stream", Text, nullable=False),
    Column("since_boot", BigInteger, nullable=False),
    Column("first_seq", BigInteger, nullable=False),
    Column("last_seq", BigInteger, nullable=False),
    # open, filled (they came), gone (they will not come; `note` says why)
    Column("status", Text, nullable=False),
    Column("found_at", UtcTime, nullable=False),
    Column("asked_at", UtcTime),
    Column("asks", Integer, nullable=False),
    Column("closed_at", UtcTime),
    Column("note", Text),
    Index("gaps_by_device", "site", "device", "status"),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    # SHA-256 of topic and payload: the same message again is counted, not stored again.
    Column("digest", Text, primary_key=True),
    Column("topic", Text, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("reason", Text, nullable=False),
    Column("site", Text),
    Column("device", Text),
    Column("stream", Text),
    Column("boot", BigInteger),
    Column("seq", BigInteger),
    Column("first_at", UtcTime, nullable=False),
    Column("last_at", UtcTime, nullable=False),
    Column("times", BigInteger, nullable=False),
)
