"""A report as CSV: one line for each figure, for a spreadsheet or a laboratory system."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = (
    *("sample", "accession", "age_band", "site", "device", "report", "status", "at", "part", "name"),
    *("count", "value", "low", "high", "unit", "corrected", "corrected_low", "corrected_high"),
    *("flag", "reference_low", "reference_high", "notice"),
)

Row = dict[str, Any]


def render_csv(document: Mapping[str, Any]) -> str:
    """UTF-8 text with a head line; empty = not told."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    differential = document["differential"]
    same = {key: document[key] for key in ("sample", "accession", "age_band", "site", "device", "report", "status")}
    for row in _rows(document, differential):
        writer.writerow({**same, "at": differential["at"], "notice": document["notice"], **row})
    return text.getvalue()


def _rows(document: Mapping[str, Any], differential: Mapping[str, Any]) -> Iterator[Row]:
    for share in differential["shares"]:
        corrected, reference = share["corrected"] or {}, share["reference"] or {}
        yield {
            "part": "share",
            "name": share["class"],
            "count": share["count"],
            "value": share["pct"],
            "low": share["low_pct"],
            "high": share["high_pct"],
            "unit": "% of leukocytes",
            "corrected": corrected.get("pct"),
            "corrected_low": corrected.get("low_pct"),
            "corrected_high": corrected.get("high_pct"),
            "flag": share["flag"],
            "reference_low": reference.get("low_pct"),
            "reference_high": reference.get("high_pct"),
        }
    for ratio in differential["per_100_leukocytes"]:
        yield _ratio(ratio, "ratio", "for 100 leukocytes")
    for ratio in differential["per_field"]:
        yield _ratio(ratio, "ratio", "in a field")
    if (ratio := differential["red_cells_per_leukocyte"]) is not None:
        yield _ratio(ratio, "ratio", "for a leukocyte")
    for one in differential["per_ul"]:
        bounds = {"low": one["low_per_ul"], "high": one["high_per_ul"]}
        yield {
            "part": "concentration",
            "name": one["name"],
            "count": one["count"],
            "value": one["per_ul"],
            **bounds,
        } | {"unit": "in a microlitre"}
    for name in ("leukocytes", "nucleated", "unidentified", "not_classed", "fields", "amendments"):
        yield {"part": "count", "name": name, "count": differential[name]}
    for name, count in differential["counts"].items():
        yield {"part": "class", "name": name, "count": count}
    for reason, count in document["quality"]["refused"].items():
        yield {"part": "refused frames", "name": reason, "count": count}


def _ratio(ratio: Mapping[str, Any], part: str, unit: str) -> Row:
    bounds = {"value": ratio["ratio"], "low": ratio["low"], "high": ratio["high"]}
    return {"part": part, "name": ratio["name"], "count": ratio["count"], **bounds, "unit": unit}
