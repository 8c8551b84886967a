"""The report of a sample as one JSON object: all that stands on paper, and nothing but what the messages say.

    SampleRecord --compose--> document --> html | csv | json      (each a rendering of the same object)

Whoever renders it (the command line, a page) needs no other source. It names no person: ids, tokens and an age band.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime
from statistics import median
from typing import Any

from agent.analysis.agreement import Agreement, measure_agreement
from agent.analysis.cells import UNIDENTIFIED
from agent.report.formats import Document, document_head
from agent.report.record import NothingToReport, SampleRecord
from agent.report.slide_map import MapMaker
from agent.review import KeptCell

SCHEMA = "hematovision/report/1"

GALLERY_PER_CLASS = 12
"""Pictures of a class: two rows on paper."""

LOW_MARGIN = 0.2
"""Cells whose name was nearer than this to another one are told by class."""


def compose(record: SampleRecord, at: datetime) -> Document:
    """The report as of now. Raises NothingToReport."""
    if not record.differentials:
        raise NothingToReport(f"sample {record.sid}: there is no differential of it at this {record.source}")
    newest = record.differentials[-1]
    names = {answer.cell_id: answer.person for answer in record.answers}
    seen = _Seen(names)
    for field in record.fields:
        seen.add(field)
    sample = record.sample or {}
    document: Document = {
        **document_head(SCHEMA, record.source, at),
        "site": record.site,
        "device": record.device,
        "sample": record.sid,
        "accession": newest.get("accession"),
        "age_band": newest.get("age_band"),
        "opened_at": sample.get("opened_at"),
        "ended_at": sample.get("ended_at"),
        "end_reason": sample.get("end_reason"),
        "status": newest["status"],
        "report": newest.get("report"),
        "history": [
            {key: report.get(key) for key in ("report", "status", "at", "supersedes", "amendments", "leukocytes")}
            for report in record.differentials
        ],
        "differential": dict(newest),
        "quality": seen.quality(newest),
        "classes": seen.classes(),
        "gallery": _gallery(record.crops.values(), names),
        "review": _review(record, measure_agreement(record.answers)),
        "slide_map": seen.map.finish(frozenset(seen.superseded)),
        "provenance": seen.provenance(newest["provenance"]),
    }
    document["remarks"] = list(_remarks(document))
    return document


class _Seen:
    """What the fields of a sample say together; keeps little of each."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.map = MapMaker()
        self.superseded: set[str] = set()
        self._names = names
        self._fields = 0
        self._cells = 0
        self._focus: list[float] = []
        self._clock_true = 0
        self._span: list[str] = []
        self._provenances: dict[str, Mapping[str, Any]] = {}
        self._fields_by: Counter[str] = Counter()
        self._confidence: dict[str, list[float]] = defaultdict(list)
        self._low_margin: Counter[str] = Counter()
        self._places: Counter[str] = Counter()

    def add(self, field: Mapping[str, Any]) -> None:
        self._fields += 1
        self._cells += len(field["cells"])
        self._focus.append(float(field["frame"]["focus"]))
        self._clock_true += bool(field["clock"]["synchronised"])
        self._span = [*self._span[:1], field["captured_at"]]
        who = str(sorted(field["provenance"].items(), key=str))
        self._provenances.setdefault(who, field["provenance"])
        self._fields_by[who] += 1
        self._places[field["place"]["source"] if "place" in field else "unknown"] += 1
        self.map.add(field, self._names)
        for cell in field["cells"]:
            self.superseded.update(cell.get("supersedes", ()))
            if not cell["probabilities"] or cell["status"] in ("duplicate", "artefact"):
                continue
            name = UNIDENTIFIED if cell["status"] == UNIDENTIFIED else cell["class"]
            self._confidence[name].append(float(cell["probability"]))
            self._low_margin[name] += (cell["margin"] or 0.0) < LOW_MARGIN

    def quality(self, differential: Mapping[str, Any]) -> Document:
        focus = sorted(self._focus)
        return {
            "fields": differential["fields"],
            "fields_here": self._fields,
            "refused": differential.get("refused", {}),
            "cells_seen": self._cells,
            "places": dict(sorted(self._places.items())),
            "basis": differential["basis"],
            "focus": None
            if not focus
            else {
                "median": round(median(focus), 1),
                "lowest": focus[0],
                "p05": focus[int(0.05 * (len(focus) - 1))],
                "highest": focus[-1],
            },
            "clock_synchronised_fields": self._clock_true,
            "first_captured_at": self._span[0] if self._span else None,
            "last_captured_at": self._span[-1] if self._span else None,
        }

    def classes(self) -> list[Document]:
        """How sure the classifier was, by the name it gave; views of a cell that were counted or might be."""
        return [
            {
                "class": name,
                "cells": len(values),
                "median_probability": round(median(values), 3),
                "low_margin": self._low_margin[name],
            }
            for name, values in sorted(self._confidence.items())
        ]

    def provenance(self, newest: Mapping[str, Any]) -> Document:
        others = [
            {**body, "fields": self._fields_by[who]}
            for who, body in self._provenances.items()
            if dict(body) != dict(newest)
        ]
        return {**newest, "others": others}


def _gallery(crops: Iterable[KeptCell], names: Mapping[str, str]) -> list[Document]:
    """Of each class the pictures that are shown: those that a person named, then those that wait, then the rest."""
    by_class: dict[str, list[KeptCell]] = defaultdict(list)
    for crop in crops:
        if not crop.jpeg:
            continue
        by_class[names.get(crop.cell_id, crop.class_name)].append(crop)
    shown = []
    for name, of_class in sorted(by_class.items()):
        of_class.sort(key=lambda crop: (crop.cell_id not in names, not crop.is_open, -crop.probability, crop.cell_id))
        for crop in of_class[:GALLERY_PER_CLASS]:
            shown.append(
                {
                    "cell_id": crop.cell_id,
                    "class": name,
                    "model": crop.class_name,
                    "named_by": "person" if crop.cell_id in names else "model",
                    "probability": round(crop.probability, 4),
                    "margin": None if crop.margin is None else round(crop.margin, 4),
                    "is_open": crop.is_open,
                    "jpeg_sha256": hashlib.sha256(crop.jpeg).hexdigest(),
                }
            )
    return shown


def _review(record: SampleRecord, agreement: Agreement) -> Document:
    return {
        "open": sum(crop.is_open for crop in record.crops.values()) if record.source == "device" else None,
        "answers": agreement.answers,
        "persons": sorted({answer.by for answer in record.answers if answer.by}),
        "agreement": agreement_body(agreement),
    }


def agreement_body(agreement: Agreement) -> Document:
    """An agreement as it stands in JSON; shares in %."""
    return {
        "table": {model: dict(row) for model, row in agreement.table.items()},
        "answers": agreement.answers,
        "named": agreement.named,
        "agreed": agreement.agreed,
        "declined": agreement.declined,
        "kappa": None if agreement.kappa is None else round(agreement.kappa, 3),
        "kappa_standard_error": None if agreement.kappa_error is None else round(agreement.kappa_error, 3),
        "by_class": [
            {
                "class": one.class_name,
                "cells": one.cells,
                "agreed": one.agreed,
                "pct": None if one.share is None else round(100 * one.share, 1),
                "low_pct": None if one.interval is None else round(100 * one.interval[0], 1),
                "high_pct": None if one.interval is None else round(100 * one.interval[1], 1),
            }
            for one in agreement.by_class
        ],
    }


def _remarks(document: Document) -> Iterable[str]:
    """What a reader has to know before he believes a figure."""
    differential, quality = document["differential"], document["quality"]
    if document["status"] == "preliminary":
        yield "The sample has not ended: this is a running differential."
    if differential["basis"] == "all":
        yield "Some fields lie at an unknown place: a cell may have been counted more than once."
    if quality["fields_here"] < quality["fields"]:
        yield (
            f"Only {quality['fields_here']} of {quality['fields']} fields are kept at this {document['source']}: focus,"
            " confidence and the slide map are those of these fields; the differential is of all of them."
        )
    if quality["clock_synchronised_fields"] < quality["fields_here"]:
        yield "The device's clock did not follow a reference all the time: times may be wrong."
    if document["provenance"]["others"]:
        yield "Models or configuration were changed while the sample was counted."
    if amendments := differential["amendments"]:
        yield f"A person has changed the name of a cell {'once' if amendments == 1 else f'{amendments} times'}."
    if document["age_band"] is None:
        yield "No age band was told: no share is compared with a reference interval."
    if document["source"] == "collector":
        yield "Pictures of cells stay on the device; there are none in a report made at the collector."
