"""The record of a sample from the collector's database, for the same report as the device makes of its own outbox.

What the centre has not: pictures of cells, and which of them wait for a person; these stay on the device. What persons
answered comes from the audit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, and_, select

from agent.analysis.agreement import Answer
from agent.central import tables
from agent.central.cohort import Collected, read_cohort
from agent.central.database import check_schema, describe, explained, open_database
from agent.central.export import PORTION_ROWS, Selection
from agent.central.fleet import Fleet, read_fleet
from agent.central.intake import Place
from agent.central.ledger import is_of
from agent.errors import ConfigError
from agent.report.record import Body, NothingToReport, SampleRecord, with_retained

AMENDED = "cmd.amend"
"""The audit's word for an answer of a person."""


@dataclass(frozen=True, slots=True)
class Collection:
    """What was collected, to be read beside a running collector; see `open_collection`."""

    engine: Engine

    def samples(self, site: str | None = None, device: str | None = None) -> list[tuple[Place, str, str]]:
        """Device, id and status of each sample that can be reported, the newest last."""
        source = tables.differentials
        query = select(source.c.site, source.c.device, source.c.sample, source.c.status)
        for column, value in ((source.c.site, site), (source.c.device, device)):
            query = query if value is None else query.where(column == value)
        newest: dict[tuple[Place, str], str] = {}
        with explained(self.engine), self.engine.connect() as connection:
            for row in connection.execute(query.order_by(source.c.at, source.c.differential_id)):
                key = Place(row.site, row.device), row.sample
                newest.pop(key, None)
                newest[key] = row.status
        return [(place, sample, status) for (place, sample), status in newest.items()]

    def find(self, sid: str, site: str | None = None, device: str | None = None) -> Place:
        """The device that counted a sample. Raises NothingToReport; ConfigError: several have one of this id."""
        found = [place for place, sample, _ in self.samples(site, device) if sample == sid]
        if not found:
            words = f"{describe(self.engine)}: there is no differential of sample {sid}"
            raise NothingToReport(f"{words}; `hematovision report list --database URL` names those that are here")
        if len(found) > 1:
            names = ", ".join(sorted(f"{place.site}/{place.device}" for place in found))
            fault = f"sample {sid} is one of several devices ({names}): give --site and --device"
            raise ConfigError("hematovision report", (fault,))
        return found[0]

    def read(self, place: Place, sid: str) -> SampleRecord:
        """Everything that was collected of a sample; its fields are read when they are walked over."""
        with explained(self.engine), self.engine.connect() as connection:
            numbered, retained = _differentials(connection, place, sid)
            return SampleRecord(
                "collector",
                place.site,
                place.device,
                sid,
                differentials=with_retained(numbered, retained),
                sample=_sample(connection, place, sid),
                fields=_fields(self.engine, place, sid),
                answers=_answers(connection, place, sid),
            )

    def fields(self, device: str, boot: int, seq: int, site: str | None = None) -> list[Body]:
        """The field of this number: one, none, or one of each site that has a device of this name."""
        source = tables.fields
        sites = select(tables.devices.c.site).where(tables.devices.c.device == device)  # an index begins with the site
        query = select(source.c.body).where(source.c.device == device, source.c.boot == boot, source.c.seq == seq)
        query = query.where(source.c.site.in_(sites) if site is None else source.c.site == site)
        with explained(self.engine), self.engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def cohort(
        self,
        site: str | None = None,
        device: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Collected:
        """The ended samples, to be compared by age band. since, until: of their newest reports."""
        return read_cohort(self.engine, Selection(site, device, since=since, until=until))

    def fleet(self, now: datetime, site: str | None = None) -> Fleet:
        """What each device said last of the figures that it watches, to be compared."""
        return read_fleet(self.engine, site, now)


@contextmanager
def open_collection(url: str, password_file: Path | None = None) -> Iterator[Collection]:
    """Raises ConfigError: no such database, or one of another version; StoreUnavailable: it is away."""
    engine = open_database(url, password_file, read_only=True)
    try:
        check_schema(engine)
        yield Collection(engine)
    finally:
        engine.dispose()


def _differentials(connection: Connection, place: Place, sid: str) -> tuple[list[Body], Body | None]:
    source = tables.differentials
    query = select(source.c.seq, source.c.body).where(_of(source, place, sid)).order_by(source.c.boot, source.c.seq)
    rows = list(connection.execute(query))
    retained = [row.body for row in rows if row.seq is None]
    return [row.body for row in rows if row.seq is not None], retained[0] if retained else None


def _sample(connection: Connection, place: Place, sid: str) -> Body | None:
    source = tables.samples
    body: Body | None = connection.execute(select(source.c.body).where(_of(source, place, sid))).scalar_one_or_none()
    return body


def _fields(engine: Engine, place: Place, sid: str) -> Iterator[Body]:
    source = tables.fields
    # + 0: else SQLite takes the index that has this order, and with it every field of the device.
    query = select(source.c.body).where(_of(source, place, sid)).order_by(source.c.boot + 0, source.c.seq)
    with explained(engine), engine.connect().execution_options(yield_per=PORTION_ROWS) as connection:
        for row in connection.execute(query):
            yield row.body


def _answers(connection: Connection, place: Place, sid: str) -> list[Answer]:
    """The newest answer to each cell; the model's name is the one that the first answer found."""
    source = tables.audit
    of_device = and_(is_of(source, place), source.c.action == AMENDED, source.c.outcome == "done")
    newest: dict[str, Answer] = {}
    query = select(source.c.body).where(of_device).order_by(source.c.boot, source.c.seq)
    for row in connection.execution_options(yield_per=PORTION_ROWS).execute(query):
        detail: Mapping[str, Any] = row.body["detail"]
        if detail.get("sample") != sid:
            continue
        cell_id = str(detail["cell_id"])
        model = newest[cell_id].model if cell_id in newest else str(detail["from"])
        newest[cell_id] = Answer(
            cell_id, model, str(detail["to"]), row.body["by"], row.body["at"], detail.get("reason")
        )
    return list(newest.values())


def _of(source: Any, place: Place, sid: str) -> ColumnElement[bool]:
    return and_(is_of(source, place), source.c.sample == sid)
