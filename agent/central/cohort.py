"""What the database says of each ended sample, for a comparison by age band (`agent.analysis.cohort`)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median
from typing import Any

from sqlalchemy import Connection, Engine, func, select

from agent.analysis.cohort import BANDS, SampleFacts
from agent.central import tables
from agent.central.database import explained
from agent.central.export import PORTION_ROWS, Selection, chosen
from agent.central.intake import Place
from agent.central.ledger import is_of
from agent.report.document import LOW_MARGIN

Key = tuple[str, str, str]
"""Site, device, sample."""

SAMPLES_AT_ONCE = 100
"""Whose cells are asked for in one query: SQLite binds at least 999 values."""

LOOKED_AT = ("accepted", "edge", "unidentified")
"""Cells that the classifier was asked about; the other views of a cell are `duplicate`."""


@dataclass(frozen=True, slots=True)
class Collected:
    """left_out: samples that are not compared, by the reason in words."""

    samples: Sequence[SampleFacts]
    left_out: Mapping[str, int]


def read_cohort(engine: Engine, selection: Selection) -> Collected:
    """Of each sample its newest report; the times of the selection are those of reports."""
    left_out: Counter[str] = Counter()
    found: dict[Key, SampleFacts] = {}
    with explained(engine), engine.connect() as connection:
        for key, body in _newest(connection, selection):
            if body["status"] == "preliminary":
                left_out["not ended"] += 1
            else:
                found[key] = _facts(key, body)
        aborted = select(func.count()).select_from(tables.samples).where(tables.samples.c.phase == "aborted")
        if thrown_over := connection.execute(chosen(aborted, tables.samples, "updated_at", selection)).scalar_one():
            left_out["thrown over"] = thrown_over
        keys = sorted(found)
        for device, its in groupby(keys, key=lambda key: key[:2]):
            sids = [sid for _, _, sid in its]
            for start in range(0, len(sids), SAMPLES_AT_ONCE):
                for key, sureness in _sureness(
                    connection, Place(*device), sids[start : start + SAMPLES_AT_ONCE]
                ).items():
                    found[key] = replace(found[key], confidence_pct=sureness[0], low_margin_pct=sureness[1])
    return Collected([found[key] for key in keys], dict(left_out))


def _newest(connection: Connection, selection: Selection) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    source = tables.differentials
    query = chosen(
        select(source.c.site, source.c.device, source.c.sample, source.c.body), source, "at", selection
    ).order_by(
        source.c.site,
        source.c.device,
        source.c.sample,
        source.c.seq.is_(None),  # the running one comes after the reports
        source.c.boot.desc(),
        source.c.seq.desc(),
    )
    last: Key | None = None
    for row in connection.execution_options(yield_per=PORTION_ROWS).execute(query):
        key = (row.site, row.device, row.sample)
        if key != last:
            yield key, row.body
        last = key


def _facts(key: Key, body: Mapping[str, Any]) -> SampleFacts:
    who = body["provenance"]["classifier"]
    band = body["age_band"]
    return SampleFacts(
        microscope=key[:2],
        age_band=band if band in BANDS else None,
        accession=body["accession"],
        models=f"{who['name']} {who['version']} ({who['sha256'][:16]})",
        leukocytes=body["leukocytes"],
        shares_pct={share["class"]: share["pct"] for share in body["shares"]},
        per_100={ratio["name"]: ratio["ratio"] for ratio in body["per_100_leukocytes"]},
        flags={share["class"]: share["flag"] for share in body["shares"] if share["flag"] is not None},
        unidentified=body["unidentified"],
        nucleated=body["nucleated"],
        fields=body["fields"],
        refused=body.get("refused", {}),
    )


def _sureness(connection: Connection, place: Place, sids: Sequence[str]) -> dict[Key, tuple[float, float]]:
    """Of each sample that has cells here: median probability in %, and in % the views with a low margin.

    Samples of one device: asked for those of several at once, SQLite reads all cells.
    """
    source = tables.cells
    query = select(source.c.sample, source.c.probability, source.c.margin).where(
        is_of(source, place),
        source.c.sample.in_(sids),
        source.c.status.in_(LOOKED_AT),
        source.c.margin.is_not(None),
        source.c.probability.is_not(None),
    )
    probabilities: dict[Key, list[float]] = defaultdict(list)
    low: Counter[Key] = Counter()
    for row in connection.execute(query):
        key = (place.site, place.device, row.sample)
        probabilities[key].append(row.probability)
        low[key] += row.margin < LOW_MARGIN
    return {key: (100 * median(values), 100 * low[key] / len(values)) for key, values in probabilities.items()}
