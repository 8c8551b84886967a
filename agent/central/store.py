"""The store: a batch of messages becomes rows, all of it or nothing of it, and what may be acknowledged comes back.

    arrivals --read_message--> messages --one transaction--> rows, numbers, gaps --commit--> Outcome(acks)

What it promises
  * When `commit` returns, every arrival of the batch is on the database's disk: as rows, or as a dead letter with the
    reason. What `Outcome.acks` says was committed before it was said.
  * A message that came before is stored once. The same id with another content is no repeat: it becomes a dead letter.
  * One bad message never keeps the others of its batch out.

What it does not promise
  * An order among devices, or that a repeat is noticed by its content (only its number is looked at, then its body).

Several collectors may write to one PostgreSQL database: the rows of the batch's devices in `devices` are locked first.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, Table, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError, StatementError

from agent.central import tables
from agent.central.database import explained, reason_of
from agent.central.intake import (
    AlertMessage,
    AuditMessage,
    CellMessage,
    CellPart,
    DifferentialMessage,
    EventMessage,
    FieldMessage,
    HealthMessage,
    InfoMessage,
    Message,
    MessageUnusable,
    Number,
    Place,
    ReplyMessage,
    SampleMessage,
    StateMessage,
    read_message,
)
from agent.central.ledger import Ack, Book, Ledger, Question, insert_into, is_due, is_of, open_gaps, take_questions
from agent.central.numbers import Span

logger = logging.getLogger(__name__)

Row = dict[str, Any]

COMPARED = {
    "field": tables.fields,
    "event": tables.events,
    "audit": tables.audit,
    "differential": tables.differentials,
}
"""Where the body of a message is kept; of cells it is not, the columns say all."""

MOST_COMPARED = 100
"""Repeats in one query: SQLite binds at least 999 values."""

AWAKE = frozenset({"init", "ready", "degraded", "sleeping"})


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message as the broker handed it over."""

    topic: str
    payload: bytes
    received_at: datetime
    is_retained: bool = False


@dataclass(slots=True)
class Outcome:
    """What a commit did. acks: to be told to the devices, newest last."""

    acks: list[Ack] = field(default_factory=list)
    stored: int = 0
    repeats: int = 0
    dead: int = 0


class Store:
    """Writes to one database, for one collector; belongs to one thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._books: dict[Place, Book] = {}

    def commit(self, arrivals: Sequence[Arrival]) -> Outcome:
        """Store a batch. Raises StoreUnavailable: nothing of it is stored, try all of it again."""
        if not arrivals:
            return Outcome()
        try:
            return self._commit(arrivals)
        except _Culprit as error:
            if len(arrivals) == 1:
                return self._bury(arrivals[0], error)
        # Somewhere in the batch is a message that the database refuses. One at a time shows which.
        outcome = Outcome()
        for arrival in arrivals:
            try:
                one = self._commit([arrival])
            except _Culprit as error:
                one = self._bury(arrival, error)
            outcome.acks += one.acks
            outcome.stored += one.stored
            outcome.repeats += one.repeats
            outcome.dead += one.dead
        return outcome

    def acks(self) -> list[Ack]:
        """All that may be acknowledged, of all devices and their newest numbers: for a collector that has started."""
        page = tables.acks
        newest = (
            select(page.c.site, page.c.device, func.max(page.c.since_boot).label("since_boot"))
            .group_by(page.c.site, page.c.device)
            .subquery()
        )
        same = and_(*(page.c[name] == newest.c[name] for name in ("site", "device", "since_boot")))
        query = select(page).join(newest, same).where(page.c.seq > 0)
        with explained(self._engine), self._engine.connect() as connection:
            return [
                Ack(Place(row.site, row.device), row.stream, row.boot, row.seq) for row in connection.execute(query)
            ]

    def questions(self, now: datetime, most: int = 20) -> list[Question]:
        """What the devices should be asked for now; that they were asked is noted."""
        with explained(self._engine):
            with self._engine.connect() as connection:  # mostly there is nothing: no lock for that
                if not any(is_due(row, now) for row in connection.execute(open_gaps())):
                    return []
            with self._engine.begin() as connection:
                return take_questions(connection, now, most)

    # ---- inside

    def _commit(self, arrivals: Sequence[Arrival]) -> Outcome:
        try:
            with self._engine.begin() as connection:
                batch = _Batch(connection, self._books, arrivals[-1].received_at)
                batch.take(arrivals)
                batch.write()
        except StatementError as error:
            self._books.clear()
            if _is_about_a_value(error):
                raise _Culprit(reason_of(error)) from error
            with explained(self._engine):
                raise
        except (SQLAlchemyError, OSError):
            self._books.clear()
            with explained(self._engine):
                raise
        except (ValueError, OverflowError, TypeError) as error:
            self._books.clear()
            raise _Culprit(reason_of(error)) from error
        except BaseException:
            self._books.clear()
            raise
        return batch.outcome

    def _bury(self, arrival: Arrival, error: _Culprit) -> Outcome:
        """Set aside a message that could be read and that the database refuses."""
        with explained(self._engine), self._engine.begin() as connection:
            batch = _Batch(connection, self._books, arrival.received_at)
            batch.bury_refused(arrival, f"the database refuses it: {error}")
            batch.write()
        return batch.outcome


class _Culprit(Exception):
    """The database refuses a value, not the work."""


class _Batch:
    """One transaction's work."""

    def __init__(self, connection: Connection, books: dict[Place, Book], now: datetime) -> None:
        self.outcome = Outcome()
        self._connection = connection
        self._now = now
        self._ledger = Ledger(connection, books, now)
        self._rows: dict[Table, list[Row]] = defaultdict(list)
        self._repeated: list[tuple[Arrival, Message, Number]] = []
        self._samples: dict[tuple[Place, str], Row] = {}

    def take(self, arrivals: Sequence[Arrival]) -> None:
        read: list[tuple[Arrival, Message | MessageUnusable]] = []
        for arrival in arrivals:
            try:
                read.append((arrival, read_message(arrival.topic, arrival.payload, is_retained=arrival.is_retained)))
            except MessageUnusable as unusable:
                read.append((arrival, unusable))
        self._ledger.lock(got.place for _, got in read if got.place is not None)
        for arrival, got in read:
            if isinstance(got, MessageUnusable):
                self.bury(arrival, got.reason, got.place, got.number)
            elif got.number is not None:
                self._take_numbered(arrival, got, got.number)
            else:
                self._take_document(arrival, got)

    def bury_refused(self, arrival: Arrival, reason: str) -> None:
        """A message that could be read and that the database does not take."""
        got: Message | MessageUnusable
        try:
            got = read_message(arrival.topic, arrival.payload, is_retained=arrival.is_retained)
        except MessageUnusable as unusable:
            got = unusable
        self._ledger.lock([] if got.place is None else [got.place])
        self.bury(arrival, reason, got.place, got.number)

    def bury(self, arrival: Arrival, reason: str, place: Place | None, number: Number | None) -> None:
        """Into the dead letters, with its reason; its number counts as arrived, for the bytes are kept."""
        if place is not None and number is not None and not self._ledger.note(place, number):
            self.outcome.repeats += 1
        digest = hashlib.sha256(arrival.topic.encode("utf-8", "replace") + b"\n" + arrival.payload).hexdigest()
        letters = tables.dead_letters
        statement = insert_into(self._connection, letters).values(
            digest=digest,
            topic=arrival.topic.replace("\0", "?"),
            payload=arrival.payload,
            reason=reason,
            site=None if place is None else place.site,
            device=None if place is None else place.device,
            stream=None if number is None else number.stream,
            boot=None if number is None else number.boot,
            seq=None if number is None else number.seq,
            first_at=arrival.received_at,
            last_at=arrival.received_at,
            times=1,
        )
        times = self._connection.execute(
            statement.on_conflict_do_update(
                index_elements=["digest"],
                set_={"times": letters.c.times + 1, "last_at": statement.excluded.last_at, "reason": reason},
            ).returning(letters.c.times)
        ).scalar_one()
        self.outcome.dead += 1
        if times == 1:
            logger.warning("set aside a message on %s: %s", arrival.topic, reason)

    def write(self) -> None:
        """Everything that was gathered, into the transaction."""
        self._write_samples()
        for table, rows in self._rows.items():
            self._connection.execute(insert_into(self._connection, table).on_conflict_do_nothing(), rows)
        self._compare()
        self._ledger.write()
        self.outcome.acks += self._ledger.acks()

    # ---- numbered messages

    def _take_numbered(self, arrival: Arrival, message: Message, number: Number) -> None:
        if not self._ledger.note(message.place, number):
            self.outcome.repeats += 1
            self._repeated.append((arrival, message, number))
            return
        self.outcome.stored += 1
        part = message.part
        if isinstance(part, FieldMessage):
            self._add_field(arrival, message, number, part)
        elif isinstance(part, CellMessage):
            self._add_cell_message(arrival, message, part)
        elif isinstance(part, EventMessage):
            self._add_event(arrival, message, number, part)
        elif isinstance(part, AuditMessage):
            self._add_audit(arrival, message, number, part)
        elif isinstance(part, DifferentialMessage):
            self._add_differential(arrival, message, number, part)

    def _add_field(self, arrival: Arrival, message: Message, number: Number, part: FieldMessage) -> None:
        frame, provenance = part.frame, part.provenance
        stage = frame.stage_um or (None, None)
        self._rows[tables.fields].append(
            {
                **_key(message.place, number),
                "sample": part.sample,
                "accession": part.accession,
                "captured_at": part.captured_at,
                "captured_monotonic_ns": part.captured_monotonic_ns,
                "received_at": arrival.received_at,
                "clock_synchronised": part.clock.synchronised,
                "clock_offset_ms": part.clock.offset_ms,
                "frame_n": frame.n,
                "frame_sha256_16": frame.sha256_16,
                "width_px": frame.width_px,
                "height_px": frame.height_px,
                "um_per_px": frame.um_per_px,
                "stage_x_um": stage[0],
                "stage_y_um": stage[1],
                "focus": frame.focus,
                "clipped_pct": frame.clipped_pct,
                "total_ms": part.timing_ms.get("total"),
                "counts": part.counts,
                "unique_counts": part.unique_counts,
                "duplicates": part.duplicates,
                "cell_count": len(part.cells),
                "agent": provenance.agent,
                "detector": f"{provenance.detector.name} {provenance.detector.version}".strip() or None,
                "classifier": f"{provenance.classifier.name} {provenance.classifier.version}".strip() or None,
                "config_sha256": provenance.config_sha256,
                "historical": part.historical,
                "body": message.body,
            }
        )
        for cell in part.cells:
            self._add_cell(message.place, part.sample, part.captured_at, cell, number.boot, number.seq)
        self._see_sample(message.place, part.sample)

    def _add_cell_message(self, _arrival: Arrival, message: Message, part: CellMessage) -> None:
        """A cell on its own topic: the same as in its field, whichever comes first."""
        boot = seq = None
        if part.field_id is not None and part.field_id.count(":") == 2:
            words = part.field_id.split(":")[1:]
            boot, seq = (int(word) if word.isdecimal() and len(word) <= 16 else None for word in words)
        self._add_cell(message.place, part.sample, part.captured_at, part, boot, seq)
        self._see_sample(message.place, part.sample)

    def _add_cell(
        self, place: Place, sample: str, captured_at: datetime, cell: CellPart, boot: int | None, seq: int | None
    ) -> None:
        slide = cell.slide_um or (None, None)
        self._rows[tables.cells].append(
            {
                "site": place.site,
                "device": place.device,
                "cell_id": cell.cell_id,
                "sample": sample,
                "boot": boot,
                "seq": seq,
                "captured_at": captured_at,
                "class": cell.class_name,
                "probability": cell.probability,
                "margin": cell.margin,
                "status": cell.status,
                "duplicate_of": cell.duplicate_of,
                "x_min_px": cell.box[0],
                "y_min_px": cell.box[1],
                "x_max_px": cell.box[2],
                "y_max_px": cell.box[3],
                "slide_x_um": slide[0],
                "slide_y_um": slide[1],
                "detector_class": cell.detector.class_name,
                "detector_score": cell.detector.score,
                "probabilities": cell.probabilities,
                "morphology": cell.morphology,
            }
        )

    def _add_event(self, arrival: Arrival, message: Message, number: Number, part: EventMessage) -> None:
        self._rows[tables.events].append(
            {
                **_key(message.place, number),
                "at": part.at,
                "received_at": arrival.received_at,
                "kind": part.kind,
                "severity": part.severity,
                "message": part.message,
                "detail": part.detail,
                "historical": part.historical,
                "body": message.body,
            }
        )

    def _add_audit(self, arrival: Arrival, message: Message, number: Number, part: AuditMessage) -> None:
        self._rows[tables.audit].append(
            {
                **_key(message.place, number),
                "at": part.at,
                "received_at": arrival.received_at,
                "action": part.action,
                "outcome": part.outcome,
                "asked_by": part.by,
                "message": part.message,
                "body": message.body,
            }
        )

    def _add_differential(
        self, arrival: Arrival, message: Message, number: Number | None, part: DifferentialMessage
    ) -> None:
        """A final or amended one is kept for good; of the running ones the newest, until a final one follows."""
        table, place = tables.differentials, message.place
        of_sample = and_(is_of(table, place), table.c.sample == part.sample)
        if number is None:
            newer = select(func.count()).select_from(table).where(of_sample, table.c.at > part.at)
            if self._connection.execute(newer).scalar_one():
                return
        old = select(table.c.differential_id).where(of_sample, table.c.seq.is_(None))
        shares = tables.differential_shares
        self._connection.execute(delete(shares).where(shares.c.differential_id.in_(old)))
        self._connection.execute(delete(table).where(of_sample, table.c.seq.is_(None)))
        made = self._connection.execute(
            insert(table)
            .values(
                site=place.site,
                device=place.device,
                sample=part.sample,
                boot=None if number is None else number.boot,
                seq=None if number is None else number.seq,
                status=part.status,
                report=part.report,
                at=part.at,
                received_at=arrival.received_at,
                leukocytes=part.leukocytes,
                body=message.body,
            )
            .returning(table.c.differential_id)
        ).scalar_one()
        rows = {
            share.class_name: {
                "differential_id": made,
                "class": share.class_name,
                "count": share.count,
                "pct": share.pct,
                "low_pct": share.low_pct,
                "high_pct": share.high_pct,
                "flag": share.flag,
            }
            for share in part.shares
        }
        if rows:
            self._connection.execute(insert(shares), list(rows.values()))
        self._see_sample(place, part.sample)

    def _compare(self) -> None:
        """A repeat must say the same; two devices of one name, or one restored from a copy, do not."""
        by_boot: dict[tuple[Table, Place, int], list[tuple[Arrival, Message, int]]] = defaultdict(list)
        for arrival, message, number in self._repeated:
            if (table := COMPARED.get(number.stream)) is not None:
                by_boot[table, message.place, number.boot].append((arrival, message, number.seq))
        for (table, place, boot), repeated in by_boot.items():
            for start in range(0, len(repeated), MOST_COMPARED):
                self._compare_some(table, place, boot, repeated[start : start + MOST_COMPARED])

    def _compare_some(
        self, table: Table, place: Place, boot: int, repeated: Sequence[tuple[Arrival, Message, int]]
    ) -> None:
        # One boot of one device: asked for several at once, SQLite reads the whole table.
        column = table.c
        query = select(column.seq, column.body).where(
            is_of(table, place), column.boot == boot, column.seq.in_([seq for _, _, seq in repeated])
        )
        stored = {row.seq: row.body for row in self._connection.execute(query)}
        for arrival, message, seq in repeated:
            # Not there: it is among the dead letters.
            if seq in stored and _content(stored[seq]) != _content(message.body or {}):
                self.bury(arrival, "the same id as another message that says something else", place, None)

    # ---- documents: only the newest word counts

    def _take_document(self, arrival: Arrival, message: Message) -> None:
        self.outcome.stored += 1
        place, part = message.place, message.part
        if isinstance(part, StateMessage):
            self._set_device(place, part.boot, state=part.state, state_at=part.at)
            if part.state in AWAKE:
                self._ledger.wake(place)
        elif isinstance(part, InfoMessage):
            self._set_device(place, part.boot, agent=part.agent, info=message.body)
            if part.numbered_since_boot is not None:
                self._ledger.note_beginning(place, part.numbered_since_boot)
        elif isinstance(part, HealthMessage):
            self._set_device(place, part.boot, health=message.body, health_at=part.at)
        elif message.kind == "sample":
            self._set_sample(message)
        elif message.kind == "alert":
            self._set_alert(arrival, message)
        elif isinstance(part, DifferentialMessage):
            self._add_differential(arrival, message, None, part)
        elif isinstance(part, ReplyMessage):
            self._take_reply(place, part)

    def _set_device(self, place: Place, boot: int, **values: Any) -> None:
        # A broker that kept an old retained word tells it again; a higher boot is always newer.
        table = tables.devices
        is_newer = or_(table.c.boot.is_(None), table.c.boot <= boot)
        self._connection.execute(update(table).where(is_of(table, place), is_newer).values(boot=boot, **values))

    def _see_sample(self, place: Place, sample: str) -> None:
        self._samples.setdefault((place, sample), {})

    def _set_sample(self, message: Message) -> None:
        sample = message.about[0]
        self._see_sample(message.place, sample)
        if (part := message.part) is None:  # cleared: archived at the device; what it said last stays here
            return
        assert isinstance(part, SampleMessage)
        self._samples[message.place, sample] = {
            "phase": part.phase,
            "accession": part.accession,
            "age_band": part.age_band,
            "opened_at": part.opened_at,
            "ended_at": part.ended_at,
            "end_reason": part.end_reason,
            "boot": part.boot,
            "body": message.body,
        }

    def _write_samples(self) -> None:
        table = tables.samples
        for (place, sample), values in self._samples.items():
            statement = insert_into(self._connection, table).values(
                site=place.site, device=place.device, sample=sample, updated_at=self._now, **values
            )
            if values:
                statement = statement.on_conflict_do_update(
                    index_elements=["site", "device", "sample"],
                    set_={**values, "updated_at": self._now},
                    where=or_(table.c.boot.is_(None), table.c.boot <= values["boot"]),
                )
            else:
                statement = statement.on_conflict_do_nothing()
            self._connection.execute(statement)

    def _set_alert(self, arrival: Arrival, message: Message) -> None:
        table, place, alert = tables.alerts, message.place, message.about[0]
        if (part := message.part) is None:
            is_open = and_(is_of(table, place), table.c.alert == alert, table.c.cleared_at.is_(None))
            self._connection.execute(update(table).where(is_open).values(cleared_at=arrival.received_at))
            return
        assert isinstance(part, AlertMessage)
        values: Row = {
            "since": part.since,
            "severity": part.severity,
            "message": part.message,
            "body": message.body,
            "cleared_at": None,
        }
        self._connection.execute(
            insert_into(self._connection, table)
            .values(site=place.site, device=place.device, alert=alert, **values)
            .on_conflict_do_update(index_elements=["site", "device", "alert"], set_=values)
        )

    def _take_reply(self, place: Place, part: ReplyMessage) -> None:
        """The answer to a question of ours: which of the numbers the device no longer has."""
        words = (part.transaction or "").split("-")
        if len(words) != 3 or words[0] != "gap" or not words[1].isdecimal() or len(words[1]) > 15:
            return  # somebody else's question
        self._ledger.give_up(place, int(words[1]), _gone_in(part.data))


# ------------------------------------------------------------------------------------------------------- the parts


def _is_about_a_value(error: StatementError) -> bool:
    """Whether another batch would go through: the database complains of what it was given, not of how it is."""
    if isinstance(error, (DataError, IntegrityError)) or not isinstance(error, DBAPIError):
        return True
    # Class 54, "program limit exceeded", such as a text too long for an index; psycopg calls it operational.
    return str(getattr(error.orig, "sqlstate", None) or "").startswith("54")


def _key(place: Place, number: Number) -> Row:
    return {"site": place.site, "device": place.device, "boot": number.boot, "seq": number.seq}


def _content(body: Mapping[str, Any]) -> dict[str, Any]:
    return {**body, "historical": None}


def _gone_in(data: Mapping[str, Any]) -> list[Span]:
    """The ranges in an answer's `gone`: [[first, last], ...]."""
    spans = []
    for pair in data.get("gone") or ():
        if isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair) and pair[0] <= pair[1]:
            spans.append(Span(*pair))
    return spans
