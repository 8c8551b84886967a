"""The ledger: which numbers of which device have arrived, kept in `received`, `acks` and `gaps`; see numbers.py.

Belongs to one transaction. What it knows of a device stays in memory between transactions (`Book`) as long as nobody
else has written: the row in `devices` carries a version, is locked first, and goes up with every transaction.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Select, Table, and_, delete, insert, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from agent.central import tables
from agent.central.intake import Number, Place
from agent.central.numbers import Numbering, Run, Span, beginning_of_another, merged

logger = logging.getLogger(__name__)

ASK_AFTER_S = 5.0
"""A hole may close by itself: a message that is sent again comes after later ones, and two collectors of one group hear
different messages."""

ASK_AGAIN_S = 30.0
LONGEST_ASK_AGAIN_S = 3600.0
"""A device that is off does not answer; asked again after 30 s, 60 s, ... one hour, and when it is back."""

MOST_AT_ONCE = 10_000
"""Numbers in one request: the device sends them beside its new results."""


@dataclass(frozen=True, slots=True)
class Ack:
    """All of this stream up to this message is on the database's disk."""

    place: Place
    stream: str
    boot: int
    seq: int


@dataclass(frozen=True, slots=True)
class Question:
    """A hole that the device is asked to fill. transaction: finds it again when the answer comes."""

    place: Place
    stream: str
    span: Span
    transaction: str


@dataclass(slots=True)
class Page:
    """One numbering of one stream: in memory what `acks`, `received` and `gaps` hold."""

    numbering: Numbering
    open_gaps: dict[int, Span]


@dataclass(slots=True)
class Book:
    """What is known of one device's numbers. sinces: the boots under which numberings began, rising, from 0."""

    version: int
    sinces: list[int]
    pages: dict[tuple[str, int], Page] = field(default_factory=dict)

    def since(self, boot: int) -> int:
        return max(since for since in self.sinces if since <= boot)

    def until(self, since: int) -> int | None:
        return min((other for other in self.sinces if other > since), default=None)


class Ledger:
    """The numbers of all devices, in one transaction.

    books: kept between transactions by the caller, who clears it when one of them failed.
    """

    def __init__(self, connection: Connection, books: dict[Place, Book], now: datetime) -> None:
        self._connection = connection
        self._books = books
        self._now = now
        self._fresh: dict[tuple[Place, str, int], list[int]] = defaultdict(list)
        self._touched: dict[tuple[Place, str, int], None] = {}
        self._awake: dict[Place, None] = {}

    def lock(self, places: Iterable[Place]) -> None:
        """Make sure of the devices' rows, lock them, and drop from memory what another collector has changed."""
        devices, now = tables.devices, self._now
        wanted = sorted(set(places))
        if not wanted:
            return
        for place in [place for place in wanted if place not in self._books]:
            self._connection.execute(
                insert_into(self._connection, devices)
                .values(site=place.site, device=place.device, first_seen_at=now, last_seen_at=now, version=0)
                .on_conflict_do_nothing()
            )
        key = tuple_(devices.c.site, devices.c.device)
        found = self._connection.execute(
            select(devices.c.site, devices.c.device, devices.c.version)
            .where(key.in_([(place.site, place.device) for place in wanted]))
            .order_by(devices.c.site, devices.c.device)
            .with_for_update()
        )
        for row in found.all():
            place = Place(row.site, row.device)
            book = self._books.get(place)
            if book is None or book.version != row.version:
                book = self._books[place] = Book(row.version, self._sinces(place))
            book.version += 1
        self._connection.execute(
            update(devices)
            .where(key.in_([(place.site, place.device) for place in wanted]))
            .values(version=devices.c.version + 1, last_seen_at=now)
        )

    def note(self, place: Place, number: Number) -> bool:
        """Enter a number; whether it is there for the first time."""
        book = self._books[place]
        while True:
            since = book.since(number.boot)
            page = self._page(place, number.stream, since)
            if not page.numbering.contradicts(number.boot, number.seq):
                break
            self._split(place, number, since)
        self._touched[place, number.stream, since] = None
        gone_before = len(page.numbering.gone), sum(gone.size for gone in page.numbering.gone)
        is_new = page.numbering.take(number.boot, number.seq)
        if gone_before != (len(page.numbering.gone), sum(gone.size for gone in page.numbering.gone)):
            self._narrow_gone(place, number, since)
        if is_new:
            self._fresh[place, number.stream, number.boot].append(number.seq)
        return is_new

    def note_beginning(self, place: Place, begun: int) -> None:
        """The device says that it has numbered at 1 anew in this boot; what came before is of another numbering.

        Numbers alone show it only when two of them contradict each other: not while the first ones are missing.
        """
        self._write_received()
        received = tables.received
        since = self._books[place].since(begun)
        is_before = and_(is_of(received, place), received.c.boot >= since, received.c.boot < begun)
        if since < begun and self._connection.execute(select(received.c.boot).where(is_before).limit(1)).first():
            self._begin_another(place, since, begun)

    def give_up(self, place: Place, gap_id: int, gone: Sequence[Span]) -> None:
        """The device was asked about a gap and no longer has these of its numbers."""
        gaps = tables.gaps
        gap = self._connection.execute(
            select(gaps).where(is_of(gaps, place), gaps.c.gap_id == gap_id, gaps.c.status == "open")
        ).one_or_none()
        if gap is None or gap.since_boot != self._books[place].sinces[-1]:
            return
        page = self._page(place, gap.stream, gap.since_boot)
        for span in gone:
            if span.overlaps(Span(gap.first_seq, gap.last_seq)):
                asked = Span(max(span.first, gap.first_seq), min(span.last, gap.last_seq))
                self._close_gaps(place, gap.stream, page, asked, "the device no longer has them")
        self._touched[place, gap.stream, gap.since_boot] = None

    def wake(self, place: Place) -> None:
        """A device is back: what it did not answer may be asked at once, and it is told all that has arrived."""
        self._awake[place] = None

    def write(self) -> None:
        """What was noted, into the transaction."""
        self._write_received()
        for place, stream, since in self._touched:
            self._write_page(place, stream, since)
        for place in self._awake:
            self._ask_soon(place)

    def acks(self) -> list[Ack]:
        """What may be told when this transaction is committed: the devices that sent something, and those just back."""
        acks: dict[tuple[Place, str, int], Ack] = {}
        wanted = dict.fromkeys(self._touched)
        for place in self._awake:
            since = self._books[place].sinces[-1]
            of_newest = and_(is_of(tables.acks, place), tables.acks.c.since_boot == since)
            streams = self._connection.execute(select(tables.acks.c.stream).where(of_newest)).scalars()
            wanted |= dict.fromkeys((place, stream, since) for stream in streams)
        for place, stream, since in wanted:
            numbering = self._page(place, stream, since).numbering
            if numbering.received_seq:
                ack = Ack(place, stream, numbering.complete_boot, numbering.received_seq)
                acks[place, stream, since] = ack
        return sorted(acks.values(), key=lambda ack: (ack.place, ack.stream, ack.boot))

    # ---- inside

    def _sinces(self, place: Place) -> list[int]:
        acks = tables.acks
        found = self._connection.execute(select(acks.c.since_boot).where(is_of(acks, place)).distinct())
        return sorted({0, *found.scalars()})

    def _page(self, place: Place, stream: str, since: int) -> Page:
        book = self._books[place]
        if (page := book.pages.get((stream, since))) is None:
            page = book.pages[stream, since] = self._load(place, stream, since, book.until(since))
        return page

    def _load(self, place: Place, stream: str, since: int, until: int | None) -> Page:
        acks, gaps = tables.acks, tables.gaps
        entry = self._connection.execute(
            select(acks).where(is_of(acks, place, stream), acks.c.since_boot == since)
        ).one_or_none()
        complete, boot, seq = (0, 0, 0) if entry is None else (entry.complete_seq, entry.boot, entry.seq)
        spans = self._connection.execute(
            select(gaps).where(
                is_of(gaps, place, stream), gaps.c.since_boot == since, gaps.c.status.in_(("open", "gone"))
            )
        ).all()
        gone = [Span(row.first_seq, row.last_seq) for row in spans if row.status == "gone"]
        open_gaps = {row.gap_id: Span(row.first_seq, row.last_seq) for row in spans if row.status == "open"}
        above = self._runs(place, stream, since, until, beyond=complete)
        return Page(Numbering(since, complete, boot, seq, above, gone), open_gaps)

    def _runs(self, place: Place, stream: str, since: int, until: int | None, beyond: int = 0) -> list[Run]:
        received = tables.received
        query = select(received).where(
            is_of(received, place, stream), received.c.boot >= since, received.c.last_seq > beyond
        )
        if until is not None:
            query = query.where(received.c.boot < until)
        return [Run(row.first_seq, row.last_seq, row.boot) for row in self._connection.execute(query)]

    def _split(self, place: Place, number: Number, since: int) -> None:
        """The device has begun to number anew: of all its streams, what came since then is another numbering."""
        self._write_received()
        book = self._books[place]
        until = book.until(since)
        begun = beginning_of_another(self._runs(place, number.stream, since, until), number.boot, number.seq)
        self._begin_another(place, since, begun)

    def _begin_another(self, place: Place, since: int, begun: int) -> None:
        """What came since this boot leaves the numbering it was thought to be of, and is another one."""
        book = self._books[place]
        until = book.until(since)
        logger.warning("%s has lost its outbox: its numbers begin again under boot %d", place, begun)
        acks = tables.acks
        streams = set(
            self._connection.execute(
                select(acks.c.stream).where(is_of(acks, place), acks.c.since_boot == since)
            ).scalars()
        )
        streams |= {stream for stream, page_since in book.pages if page_since == since}
        book.sinces = sorted({*book.sinces, begun})
        for stream in streams:
            old = self._page(place, stream, since)
            runs = self._runs(place, stream, since, until)
            old.numbering = Numbering(since, above=[run for run in runs if run.boot < begun], gone=old.numbering.gone)
            newer = Numbering(begun, above=[run for run in runs if run.boot >= begun])
            book.pages[stream, begun] = Page(newer, {})
            self._touched[place, stream, since] = None
            self._touched[place, stream, begun] = None

    def _write_received(self) -> None:
        """Join the fresh numbers to the runs that are there."""
        received = tables.received
        for (place, stream, boot), seqs in self._fresh.items():
            for span in merged(Span(seq, seq) for seq in seqs):
                beside = and_(
                    is_of(received, place, stream),
                    received.c.boot == boot,
                    received.c.last_seq >= span.first - 1,
                    received.c.first_seq <= span.last + 1,
                )
                found = self._connection.execute(select(received).where(beside)).all()
                if found:
                    self._connection.execute(delete(received).where(beside))
                first = min([span.first, *(row.first_seq for row in found)])
                last = max([span.last, *(row.last_seq for row in found)])
                self._connection.execute(
                    insert(received).values(
                        site=place.site, device=place.device, stream=stream, boot=boot, first_seq=first, last_seq=last
                    )
                )
        self._fresh.clear()

    def _write_page(self, place: Place, stream: str, since: int) -> None:
        book = self._books[place]
        page = self._page(place, stream, since)
        numbering = page.numbering
        if book.until(since) is not None:
            # What is missing of an older numbering was in a file that is lost; there is nobody left to ask.
            note = f"the numbers began again under boot {book.until(since)}"
            for hole in numbering.holes():
                self._close_gaps(place, stream, page, hole, note)
        self._write_gaps(place, stream, page)
        acks = tables.acks
        row = {
            "complete_seq": numbering.complete_seq,
            "boot": numbering.complete_boot,
            "seq": numbering.received_seq,
            "highest_seq": numbering.highest_seq,
            "updated_at": self._now,
        }
        self._connection.execute(
            insert_into(self._connection, acks)
            .values(site=place.site, device=place.device, stream=stream, since_boot=since, **row)
            .on_conflict_do_update(index_elements=["site", "device", "stream", "since_boot"], set_=row)
        )

    def _write_gaps(self, place: Place, stream: str, page: Page) -> None:
        """Open, narrow and close the rows of `gaps` until they are the holes that there are."""
        gaps = tables.gaps
        holes = page.numbering.holes()
        if not holes and not page.open_gaps:
            return
        left = list(holes)
        for gap_id, span in list(page.open_gaps.items()):
            same = next((hole for hole in left if hole.overlaps(span)), None)
            if same is None:
                change: dict[str, Any] = {"status": "filled", "closed_at": self._now}
                del page.open_gaps[gap_id]
            else:
                left.remove(same)
                if same == span:
                    continue
                # It moves on: the device is at work, asking again can wait.
                change = {"first_seq": same.first, "last_seq": same.last, "asked_at": self._now, "asks": 1}
                page.open_gaps[gap_id] = same
            self._connection.execute(update(gaps).where(gaps.c.gap_id == gap_id).values(**change))
        for hole in left:
            page.open_gaps[self._new_gap(place, stream, page, hole, "open", None)] = hole

    def _close_gaps(self, place: Place, stream: str, page: Page, span: Span, note: str) -> None:
        """These numbers will not come."""
        before = set(page.numbering.gone)
        page.numbering.give_up(span)
        for gone in page.numbering.gone:
            if gone in before:
                continue
            logger.warning("%s: %s %d to %d will not come: %s", place, stream, gone.first, gone.last, note)
            same = next((gap_id for gap_id, open_span in page.open_gaps.items() if open_span == gone), None)
            if same is None:
                self._new_gap(place, stream, page, gone, "gone", note)
                continue
            del page.open_gaps[same]
            change = {"status": "gone", "closed_at": self._now, "note": note}
            self._connection.execute(update(tables.gaps).where(tables.gaps.c.gap_id == same).values(**change))

    def _narrow_gone(self, place: Place, number: Number, since: int) -> None:
        """A number that was given up has come after all."""
        gaps, seq = tables.gaps, number.seq
        around = and_(
            is_of(gaps, place, number.stream),
            gaps.c.since_boot == since,
            gaps.c.status == "gone",
            gaps.c.first_seq <= seq,
            gaps.c.last_seq >= seq,
        )
        for row in self._connection.execute(select(gaps).where(around)).all():
            self._connection.execute(delete(gaps).where(gaps.c.gap_id == row.gap_id))
            page = self._page(place, number.stream, since)
            for first, last in ((row.first_seq, seq - 1), (seq + 1, row.last_seq)):
                if first <= last:
                    self._new_gap(place, number.stream, page, Span(first, last), "gone", row.note)

    def _new_gap(self, place: Place, stream: str, page: Page, span: Span, status: str, note: str | None) -> int:
        row = {
            "site": place.site,
            "device": place.device,
            "stream": stream,
            "since_boot": page.numbering.since_boot,
            "first_seq": span.first,
            "last_seq": span.last,
            "status": status,
            "found_at": self._now,
            "asks": 0,
            "closed_at": None if status == "open" else self._now,
            "note": note,
        }
        made = self._connection.execute(insert(tables.gaps).values(row).returning(tables.gaps.c.gap_id))
        return int(made.scalar_one())

    def _ask_soon(self, place: Place) -> None:
        """A device is back: what it did not answer before may be asked at once."""
        gaps = tables.gaps
        self._connection.execute(
            update(gaps).where(is_of(gaps, place), gaps.c.status == "open").values(asked_at=None, asks=0)
        )


# ------------------------------------------------------------------------------------------------------ questions


def take_questions(connection: Connection, now: datetime, most: int) -> list[Question]:
    """Gaps that a device should be asked about now; that it was asked is noted."""
    gaps = tables.gaps
    asked: list[Question] = []
    rows = connection.execute(open_gaps().with_for_update()).all()
    for row in [row for row in rows if is_due(row, now)][:most]:
        connection.execute(update(gaps).where(gaps.c.gap_id == row.gap_id).values(asked_at=now, asks=row.asks + 1))
        span = Span(row.first_seq, min(row.last_seq, row.first_seq + MOST_AT_ONCE - 1))
        asked.append(Question(Place(row.site, row.device), row.stream, span, f"gap-{row.gap_id}-{row.asks + 1}"))
    return asked


def open_gaps() -> Select[Any]:
    """All of them, the oldest first."""
    return select(tables.gaps).where(tables.gaps.c.status == "open").order_by(tables.gaps.c.gap_id)


def is_due(row: Any, now: datetime) -> bool:
    """Whether it is time to ask about this gap."""
    if row.asked_at is None:
        return bool(row.asks or now - row.found_at >= timedelta(seconds=ASK_AFTER_S))
    pause_s = min(ASK_AGAIN_S * 2 ** min(row.asks - 1, 20), LONGEST_ASK_AGAIN_S)
    return bool(now - row.asked_at >= timedelta(seconds=pause_s))


# ------------------------------------------------------------------------------------------------------- the parts


def is_of(table: Table, place: Place, stream: str | None = None) -> Any:
    of_device = and_(table.c.site == place.site, table.c.device == place.device)
    return of_device if stream is None else and_(of_device, table.c.stream == stream)


def insert_into(connection: Connection, table: Table) -> Any:
    """The dialect's own INSERT, which knows ON CONFLICT."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)
