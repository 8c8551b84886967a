"""The devices of the database beside each other (`agent.analysis.fleet`), and what the collector tells of it.

    devices.health --read_fleet--> compare_fleet --FleetWatch--> fleet/{receiver}, alerts

What was told stands in the table `alerts` under FLEET, so that a collector that starts again knows what it has to
clear, and who asks for open problems finds these too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, and_, select, update

from agent.analysis.drift import figure_of
from agent.analysis.fleet import FleetDevice, Standing, WatchedFigure, compare_fleet, standing_facts, standing_words
from agent.central import tables
from agent.central.database import explained
from agent.central.intake import Place
from agent.central.ledger import insert_into, is_of
from agent.delivery.messages import rfc3339_ms, schema_name

FLEET = "fleet"
"""The kind of message, and the alert's name in the table."""

RECENT = timedelta(days=7)
"""What a device said longer ago is not compared: it may be another microscope by now."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """left_out: devices that are not compared, by the reason in words."""

    devices: Sequence[FleetDevice]
    left_out: Mapping[str, int]


def read_fleet(engine: Engine, site: str | None, now: datetime) -> Fleet:
    """What each device said last of its figures. site: None = of all sites."""
    with explained(engine), engine.connect() as connection:
        return _read(connection, site, now)


@dataclass(frozen=True, slots=True)
class FleetNews:
    """A word about a device: body None = it stands out no more."""

    place: Place
    body: Mapping[str, Any] | None


def look_at_fleet(engine: Engine, receiver: str, site: str | None, now: datetime) -> list[FleetNews]:
    """What has changed since the last look, noted in the same transaction. Raises StoreUnavailable."""
    with explained(engine), engine.begin() as connection:
        stood = dict(_standing_out(connection, site))
        before = {(place.site, place.device): _names(body) for place, body in stood.items()}
        news: list[FleetNews] = []
        judged = compare_fleet(_read(connection, site, now).devices, before)
        for key in sorted({*judged, *before}):
            place, out = Place(*key), [one for one in judged.get(key, ()) if one.stands_out]
            if {one.name for one in out} == set(before.get(key, ())):
                continue
            body = None
            if out:
                since = stood[place]["since"] if place in stood else rfc3339_ms(now)
                body = _body(place, receiver, out, since=since, at=now)
            _note(connection, place, body, now)
            news.append(FleetNews(place, body))
        return news


def standing_out(engine: Engine, site: str | None) -> list[FleetNews]:
    """All that stands: for a collector that has connected, since the broker may have lost it."""
    with explained(engine), engine.connect() as connection:
        return [FleetNews(place, body) for place, body in _standing_out(connection, site)]


# ------------------------------------------------------------------------------------------------------- the parts


def _read(connection: Connection, site: str | None, now: datetime) -> Fleet:
    source, left_out, devices = tables.devices, Counter[str](), []
    query = select(source.c.site, source.c.device, source.c.info, source.c.health, source.c.health_at)
    if site is not None:
        query = query.where(source.c.site == site)
    for row in connection.execute(query.order_by(source.c.site, source.c.device)):
        drift = (row.health or {}).get("drift")
        if row.health_at is None or now - row.health_at > RECENT:
            left_out[f"silent for {RECENT.days} days"] += 1
        elif not isinstance(drift, dict):
            left_out["not watched there"] += 1
        elif not (figures := _figures(drift)):
            left_out["still learning"] += 1
        else:
            devices.append(FleetDevice((row.site, row.device), _models(row.info), figures))
    return Fleet(devices, dict(left_out))


def _figures(drift: Mapping[str, Any]) -> dict[str, WatchedFigure]:
    """Those that this version knows and can read; the rest is of another one, or no device's word."""
    found = {}
    for name, one in dict(drift.get("figures") or {}).items():
        try:
            figure_of(name)
            found[name] = WatchedFigure(float(one["now"]), float(one["low"]), float(one["high"]))
        except (KeyError, TypeError, ValueError):
            continue
    return found


def _models(info: Mapping[str, Any] | None) -> str:
    models = (info or {}).get("models") or ()
    return ", ".join(f"{one.get('name')} {one.get('version')} ({str(one.get('sha256'))[:16]})" for one in models)


def _standing_out(connection: Connection, site: str | None) -> list[tuple[Place, Mapping[str, Any]]]:
    source = tables.alerts
    query = select(source.c.site, source.c.device, source.c.body).where(
        source.c.alert == FLEET, source.c.cleared_at.is_(None)
    )
    if site is not None:
        query = query.where(source.c.site == site)
    rows = connection.execute(query.order_by(source.c.site, source.c.device))
    return [(Place(row.site, row.device), row.body) for row in rows]


def _names(body: Mapping[str, Any]) -> Collection[str]:
    return tuple(figure["name"] for figure in body["figures"])


def _note(connection: Connection, place: Place, body: Mapping[str, Any] | None, now: datetime) -> None:
    table = tables.alerts
    if body is None:
        is_it = and_(is_of(table, place), table.c.alert == FLEET)
        connection.execute(update(table).where(is_it).values(cleared_at=now))
        return
    values = {
        "since": datetime.fromisoformat(str(body["since"]).replace("Z", "+00:00")),
        "severity": body["severity"],
        "message": body["message"],
        "body": body,
        "cleared_at": None,
    }
    connection.execute(
        insert_into(connection, table)
        .values(site=place.site, device=place.device, alert=FLEET, **values)
        .on_conflict_do_update(index_elements=["site", "device", "alert"], set_=values)
    )


def _body(place: Place, receiver: str, out: Sequence[Standing], *, since: str, at: datetime) -> dict[str, Any]:
    return {
        "schema": schema_name(FLEET),
        "receiver": receiver,
        "site": place.site,
        "device": place.device,
        "at": rfc3339_ms(at),
        "since": since,
        "severity": "warning",
        "message": standing_words(out),
        "figures": [{"name": one.name, **standing_facts(one)} for one in out],
        "ruo": True,
    }
