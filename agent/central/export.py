"""What was collected, out again: as CSV, JSON Lines, Parquet, or FHIR R4.

Reads beside a running collector and holds it up no longer than a statement takes. Rows are read in portions: a year of
cells needs no more memory than a day.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import IO, Any, Literal

from sqlalchemy import Column, Engine, LargeBinary, Select, Table, Text, select
from sqlalchemy.types import BigInteger, Boolean, Double, Integer

from agent.central import tables
from agent.central.codes import Codes
from agent.central.database import explained
from agent.central.tables import UtcTime
from agent.delivery.messages import rfc3339_ms
from agent.errors import ConfigError

Format = Literal["csv", "jsonl", "parquet", "fhir"]
Row = Mapping[str, Any]

TABLES: Mapping[str, tuple[Table, str]] = MappingProxyType(
    {
        "cells": (tables.cells, "captured_at"),
        "fields": (tables.fields, "captured_at"),
        "differentials": (tables.differentials, "at"),
        "shares": (tables.differential_shares, ""),
        "samples": (tables.samples, "updated_at"),
        "events": (tables.events, "at"),
        "audit": (tables.audit, "at"),
        "alerts": (tables.alerts, "since"),
        "devices": (tables.devices, "last_seen_at"),
        "gaps": (tables.gaps, "found_at"),
        "dead_letters": (tables.dead_letters, "first_at"),
    }
)
"""What can be exported, and the column of its time."""

PORTION_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows. None = all. since, until: in UTC, `since <= time < until`."""

    site: str | None = None
    device: str | None = None
    sample: str | None = None
    since: datetime | None = None
    until: datetime | None = None


def export(
    engine: Engine, table: str, wanted: Format, selection: Selection, sink: IO[bytes], codes: Codes | None = None
) -> tuple[int, list[str]]:
    """Write to the sink. Returns the number of rows (FHIR: Bundles) and what could not be said, in words."""
    if wanted == "fhir":
        return _write_fhir(engine, selection, sink, codes or Codes())
    writers: dict[str, Callable[[Engine, str, Selection, IO[bytes]], int]] = {
        "csv": _write_csv,
        "jsonl": _write_jsonl,
        "parquet": _write_parquet,
    }
    return writers[wanted](engine, table, selection, sink), []


# --------------------------------------------------------------------------------------------------------- formats


def _write_csv(engine: Engine, table: str, selection: Selection, sink: IO[bytes]) -> int:
    """The columns; objects as JSON. `body` is left out: it would say all of it again."""
    columns = _export_columns(table)
    text = io.TextIOWrapper(sink, encoding="utf-8", newline="", write_through=True)
    try:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.name for column in columns])
        count = 0
        for row in _read(engine, table, selection):
            writer.writerow([_plain_text(row[column.name]) for column in columns])
            count += 1
    finally:
        text.detach()  # the sink is the caller's
    return count


def _write_jsonl(engine: Engine, table: str, selection: Selection, sink: IO[bytes]) -> int:
    """One object a line: the message as the device sent it where there is one, else the columns."""
    source = TABLES[table][0]
    has_messages = "body" in source.c and "seq" in source.c
    count = 0
    for row in _read(engine, table, selection, [source.c.body] if has_messages else None):
        line = row["body"] if has_messages else {name: _plain(value) for name, value in row.items()}
        sink.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        count += 1
    return count


def _write_parquet(engine: Engine, table: str, selection: Selection, sink: IO[bytes]) -> int:
    """The columns with their types; objects as JSON text."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None

    columns = _export_columns(table)
    schema = pa.schema([(column.name, _arrow_type(pa, column)) for column in columns])
    count = 0
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        portion: list[dict[str, Any]] = []

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(portion, schema=schema))
            portion.clear()

        for row in _read(engine, table, selection):
            portion.append({name: _arrow_value(value) for name, value in row.items()})
            count += 1
            if len(portion) == 10 * PORTION_ROWS:
                flush()
        flush()
    return count


def _write_fhir(engine: Engine, selection: Selection, sink: IO[bytes], codes: Codes) -> tuple[int, list[str]]:
    """One Bundle a line: of each sample the newest report, or the running differential where there is no report."""
    try:
        from agent.central.fhir import differential_bundle
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    from agent.errors import MessageRejected

    source = tables.differentials
    count, complaints = 0, []
    newest: tuple[str, str, str] | None = None
    query = chosen(select(source), source, "at", selection).order_by(
        source.c.site,
        source.c.device,
        source.c.sample,
        source.c.seq.is_(None),
        source.c.boot.desc(),
        source.c.seq.desc(),
    )
    for row in _rows(engine, query):
        key = (row["site"], row["device"], row["sample"])
        if key == newest:
            continue  # superseded
        newest = key
        try:
            bundle = differential_bundle(row["body"], row["received_at"], codes)
        except (MessageRejected, KeyError, TypeError) as error:
            complaints.append(f"{'/'.join(key)}: {error}")
            continue
        sink.write(json.dumps(bundle, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        count += 1
    return count, complaints


# --------------------------------------------------------------------------------------------------------- reading


def _export_columns(table: str) -> list[Column[Any]]:
    source = TABLES[table][0]
    columns = [column for column in source.columns if column.name not in ("body", "version")]
    if source is tables.differential_shares:
        # They belong to a differential, which knows site, device, sample and time.
        whole = tables.differentials
        return [whole.c.site, whole.c.device, whole.c.sample, whole.c.status, whole.c.report, whole.c.at, *columns]
    return columns


def _read(engine: Engine, table: str, selection: Selection, columns: list[Column[Any]] | None = None) -> Iterator[Row]:
    source, time_column = TABLES[table]
    query = select(*(columns or _export_columns(table)))
    if source is tables.differential_shares:
        whole = tables.differentials
        query = query.join_from(source, whole, whole.c.differential_id == source.c.differential_id)
        query = chosen(query, whole, "at", selection)
    else:
        query = chosen(query, source, time_column, selection)
    return _rows(engine, query.order_by(*source.primary_key))


def _rows(engine: Engine, query: Select[Any]) -> Iterator[Row]:
    with explained(engine), engine.connect().execution_options(yield_per=PORTION_ROWS) as connection:
        for row in connection.execute(query).mappings():
            yield dict(row)


def chosen(query: Select[Any], source: Table, time_column: str, selection: Selection) -> Select[Any]:
    """The query for the selected rows of its table only."""
    for name in ("site", "device", "sample"):
        if (value := getattr(selection, name)) is None:
            continue
        if name not in source.c:
            raise ConfigError("hematovision export", (f"--{name}: the table {source.name} does not know {name}s",))
        query = query.where(source.c[name] == value)
    if selection.since is not None:
        query = query.where(source.c[time_column] >= selection.since)
    if selection.until is not None:
        query = query.where(source.c[time_column] < selection.until)
    return query


# ---------------------------------------------------------------------------------------------------------- values


def _plain(value: Any) -> Any:
    """What JSON can say."""
    if isinstance(value, datetime):
        return rfc3339_ms(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value


def _plain_text(value: Any) -> Any:
    value = _plain(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


def _arrow_value(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


def _arrow_type(pa: Any, column: Column[Any]) -> Any:
    kind = column.type
    if isinstance(kind, UtcTime):
        return pa.timestamp("ms", tz="UTC")
    if isinstance(kind, (BigInteger, Integer)):
        return pa.int64()
    if isinstance(kind, Boolean):
        return pa.bool_()
    if isinstance(kind, Double):
        return pa.float64()
    if isinstance(kind, LargeBinary):
        return pa.binary()
    assert isinstance(kind, Text) or kind is tables.Json, kind
    return pa.string()


def _not_installed(error: ModuleNotFoundError) -> ConfigError:
    fault = f"{error.name} is not installed; `pip install 'hematovision-agent[export]'` brings it"
    return ConfigError("hematovision export", (fault,))
