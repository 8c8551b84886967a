"""The comparison of samples by age band as one JSON object, and its renderings: HTML with drawings, CSV.

Comparison --compose_cohort--> document --> html | csv | json
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, get_args

from agent.analysis.cohort import UNITS, Comparison, Group, Line, Measure, Outside
from agent.report.drawing import colours_of
from agent.report.formats import Document, document_head, hand_out
from agent.report.markup import e, facts, labelled, n, page, th
from agent.report.words import counted_words

SCHEMA = "hematovision/cohort/1"

NOT_TOLD = "not told"

TITLES: Mapping[str, str] = {
    "share": "Differential",
    "per-100-leukocytes": "Outside the differential",
    "unidentified": "Unidentified cells",
    "confidence": "Confidence of the classifier",
    "low-margin": "Close calls (margin below 0.2)",
    "refused": "Refused frames",
}

COLUMNS = (
    *("age_band", "band_samples", "is_small", "measure", "name", "unit", "samples"),
    *("median", "low", "high", "quarter", "three_quarters"),
    *("compared_with_reference", "surely_below", "surely_above", "notice"),
)


def compose_cohort(
    comparison: Comparison, left_out: Mapping[str, int], selection: Mapping[str, str | None], at: datetime
) -> Document:
    """The comparison as of now. left_out: samples by reason; selection: what was asked for, None = all."""
    document: Document = {
        **document_head(SCHEMA, "collector", at),
        "selection": dict(selection),
        "rules": {
            "unit": "sample",
            "fewest_samples": comparison.fewest_samples,
            "fewest_leukocytes": comparison.fewest_leukocytes,
            "interval": {"method": "order statistics, of the median", "level_pct": 95},
        },
        "samples": sum(group.samples for group in comparison.groups),
        "left_out": dict(left_out),
        "intervals": comparison.intervals,
        "groups": [_group_body(group) for group in comparison.groups],
    }
    document["remarks"] = list(_remarks(document))
    return document


def render_cohort(document: Document, wanted: str) -> bytes:
    """wanted: html, pdf, csv or json; text is UTF-8."""
    return hand_out(
        document,
        wanted,
        html=lambda: _render_html(document),
        table=lambda: _render_csv(document),
        foot=_foot(document),
    )


# ------------------------------------------------------------------------------------------------------ the document


def _group_body(group: Group) -> Document:
    body: Document = {"age_band": group.age_band, "samples": group.samples, "is_small": group.is_small}
    if group.is_small:
        return body
    return {
        **body,
        "microscopes": group.microscopes,
        "with_shared_accession": group.with_shared_accession,
        "models": dict(group.models or {}),
        "refused": dict(group.refused or {}),
        "lines": [_line_body(line) for line in group.lines],
    }


def _line_body(line: Line) -> Document:
    spread = line.spread
    return {
        "measure": line.measure,
        "name": line.name,
        "unit": UNITS[line.measure],
        "samples": line.samples,
        "spread": None
        if spread is None
        else {
            "median": round(spread.median, 2),
            "low": round(spread.low, 2),
            "high": round(spread.high, 2),
            "quarter": round(spread.quarter, 2),
            "three_quarters": round(spread.three_quarters, 2),
        },
        "outside": None if line.outside is None else _outside_body(line.outside),
    }


def _outside_body(outside: Outside) -> Document:
    def side(count: int, interval: tuple[float, float]) -> Document:
        pct = 100 * count / outside.compared
        return {
            "samples": count,
            "pct": round(pct, 1),
            "low_pct": round(interval[0], 1),
            "high_pct": round(interval[1], 1),
        }

    return {
        "compared": outside.compared,
        "below": side(outside.below, outside.below_pct),
        "above": side(outside.above, outside.above_pct),
    }


def _remarks(document: Document) -> Iterator[str]:
    """What a reader has to know before he believes that two bands differ."""
    groups, fewest = document["groups"], document["rules"]["fewest_samples"]
    shown = [group for group in groups if not group["is_small"]]
    small = [group for group in groups if group["is_small"]]
    if small:
        names = ", ".join(f"{band_words(group)} ({group['samples']})" for group in small)
        yield f"Too few samples, below {fewest}, so nothing is told of them: {names}."
    if not shown:
        yield "No age band has enough samples: there is nothing to compare."
        return
    count = document["intervals"]
    yield (
        f"{count} intervals of 95 % stand here. Of so many about {count / 20:.0f} miss by chance alone: a difference"
        " that was found by looking through them is a question for new samples, not a finding. Nothing here is a test."
    )
    yield (
        "Samples were not drawn at random: bands may differ by patients, stains, microscopes and operators as much as"
        " by age."
    )
    if len({str(sorted(group["models"])) for group in shown}) > 1:
        yield "Not all bands were counted by the same models: a difference may be one of the models."
    if shared := [group for group in shown if group["with_shared_accession"]]:
        names = ", ".join(f"{band_words(group)} {group['with_shared_accession']}" for group in shared)
        yield (
            f"Samples that share their accession token with another one: {names}. They may be of one person, and the"
            " intervals are then too narrow."
        )
    if any(group["age_band"] is None for group in groups):
        yield "Of some samples no age band was told; they stand by themselves."


def band_words(group: Mapping[str, Any]) -> str:
    return str(group["age_band"] or NOT_TOLD)


# --------------------------------------------------------------------------------------------------------------- CSV


def _render_csv(document: Document) -> str:
    """One line for each figure; of a group that is too small one line without figures."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for group in document["groups"]:
        same = {
            "age_band": band_words(group),
            "band_samples": group["samples"],
            "is_small": "yes" if group["is_small"] else "no",
            "notice": document["notice"],
        }
        if group["is_small"]:
            writer.writerow(same)
        for line in group.get("lines", ()):
            outside = line["outside"]
            compared = {} if outside is None else {"compared_with_reference": outside["compared"]}
            if outside is not None:
                compared |= {side: outside[side[7:]]["samples"] for side in ("surely_below", "surely_above")}
            row = {key: line[key] for key in ("measure", "name", "unit", "samples")}
            writer.writerow({**same, **row, **(line["spread"] or {}), **compared})
    return text.getvalue()


# -------------------------------------------------------------------------------------------------------------- HTML


def _render_html(document: Document) -> str:
    groups = document["groups"]
    shown = [group for group in groups if not group["is_small"]]
    sections = [_head(document), _remarks_html(document), _groups(groups)]
    sections += [_measure(measure, shown) for measure in get_args(Measure)]
    sections.append(_how(document))
    return page("Comparison by age band", labelled(document["notice"], sections, _foot(document)))


def _foot(document: Document) -> str:
    return f"Comparison by age band · {document['samples']} samples · {document['made_at']}"


def _head(document: Document) -> str:
    asked = [f"{key} {value}" for key, value in document["selection"].items() if value is not None]
    left_out = counted_words(document["left_out"]) if document["left_out"] else "none"
    rows = (
        ("Samples compared", str(document["samples"])),
        ("Asked for", ", ".join(asked) or "all that was collected"),
        ("Left out", left_out),
        ("This document", f"{document['made_at']}, {document['made_by']}, from the {document['source']}"),
    )
    return f"<h1>Comparison by age band</h1>{facts(rows)}"


def _remarks_html(document: Document) -> str:
    lines = "".join(f"<li>{e(remark)}</li>" for remark in document["remarks"])
    return f'<div class="remarks" role="note"><strong>Read this first</strong><ul>{lines}</ul></div>'


def _groups(groups: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for group in groups:
        name = f'<th scope="row">{e(band_words(group))}</th>{n(group["samples"])}'
        if group["is_small"]:
            rows.append(f'<tr>{name}<td colspan="3">too few: nothing is told</td></tr>')
        else:
            models = "; ".join(f"{model}: {count}" for model, count in group["models"].items())
            refused = counted_words(group["refused"])
            rows.append(f"<tr>{name}{n(group['microscopes'])}<td>{e(refused)}</td><td>{e(models)}</td></tr>")
    head = f"<th scope='col'>Age band</th>{th('Samples')}{th('Microscopes')}"
    head += "<th scope='col'>Frames refused</th><th scope='col'>Classifier: samples</th>"
    return f"<h2>The groups</h2><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _measure(measure: str, groups: Sequence[Mapping[str, Any]]) -> str:
    """A panel for each class with its bands under each other, and the same in figures."""
    lines = [(group, line) for group in groups for line in group["lines"] if line["measure"] == measure]
    if not lines:
        return ""
    names = list(dict.fromkeys(line["name"] for _, line in lines))
    colours = colours_of(names)
    has_outside = any(line["outside"] for _, line in lines)
    panels, tables = [], []
    for name in names:
        of_name = [(band_words(group), line) for group, line in lines if line["name"] == name]
        panels.append(f"<li>{panel_svg(name, of_name, colours[name])}</li>")
        tables.append(_rows(name, of_name, has_outside=has_outside))
    unit = lines[0][1]["unit"]
    head = "<th scope='col'>Class</th>" if names != [""] else ""
    head += f"<th scope='col'>Age band</th>{th('Samples')}{th('Median')}{th('95 % interval')}{th('Middle half')}"
    if has_outside:
        head += th("Surely below") + th("Surely above")
    return (
        f'<h2>{e(TITLES[measure])}</h2><ul class="panels">{"".join(panels)}</ul>'
        f"<table><caption>Medians of the samples; unit: {e(unit)}</caption><thead><tr>{head}</tr></thead>"
        f"{''.join(tables)}</table>"
    )


def _rows(name: str, bands: Sequence[tuple[str, Mapping[str, Any]]], *, has_outside: bool) -> str:
    """The bands of one class, in figures."""
    rows = []
    for number, (band, line) in enumerate(bands):
        head = f'<th scope="rowgroup" rowspan="{len(bands)}">{e(name)}</th>' if name and number == 0 else ""
        spread, outside = line["spread"], line["outside"]
        if spread is None:
            cells = [f'<td colspan="{5 if has_outside else 3}">too few samples with it</td>']
        else:
            cells = [n(f"{spread['median']:.1f}"), n(f"{spread['low']:.1f} to {spread['high']:.1f}")]
            cells.append(n(f"{spread['quarter']:.1f} to {spread['three_quarters']:.1f}"))
        if spread is not None and has_outside:
            cells += [n("-" if outside is None else _side(outside, side)) for side in ("below", "above")]
        rows.append(f'<tr>{head}<th scope="row" class="band">{e(band)}</th>{n(line["samples"])}{"".join(cells)}</tr>')
    return f"<tbody>{''.join(rows)}</tbody>"


def _side(outside: Mapping[str, Any], side: str) -> str:
    one = outside[side]
    return f"{one['samples']}/{outside['compared']} ({one['low_pct']:.0f} to {one['high_pct']:.0f} %)"


_BAND_PX, _SCALE_PX, _ROW_PX = 86, 210, 22


def panel_svg(name: str, bands: Iterable[tuple[str, Mapping[str, Any]]], colour: str) -> str:
    """One class: for each band the median (dot), its interval (bold) and the middle half of the samples (pale)."""
    rows = list(bands)
    spreads = [line["spread"] for _, line in rows if line["spread"] is not None]
    top = max((max(spread["high"], spread["three_quarters"]) for spread in spreads), default=0.0)
    scale = next((limit for limit in (1, 2, 5, 10, 20, 40, 60, 80, 100) if limit >= top), max(top, 1.0))
    head = 20 if name else 2
    height = head + _ROW_PX * len(rows) + 20

    def x(value: float) -> float:
        return _BAND_PX + _SCALE_PX * min(value, scale) / scale

    parts = [f'<text x="0" y="14" font-size="13" font-weight="bold">{e(name)}</text>'] if name else []
    for number in range(3):
        value = scale * number / 2
        parts.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{head}" y2="{height - 18}" stroke="#ddd"/>'
            f'<text x="{x(value):.1f}" y="{height - 5}" text-anchor="middle" font-size="11" fill="#444">'
            f"{value:g}</text>"
        )
    words = []
    for row, (band, line) in enumerate(rows):
        middle = head + _ROW_PX * row + _ROW_PX / 2
        spread = line["spread"]
        parts.append(
            f'<text x="{_BAND_PX - 8}" y="{middle + 4:.1f}" text-anchor="end" font-size="12" fill="#333">'
            f"{e(band)}</text>"
        )
        if spread is None:
            parts.append(
                f'<text x="{_BAND_PX + 4}" y="{middle + 4:.1f}" font-size="11" fill="#444">too few samples</text>'
            )
            words.append(f"{band}: too few samples")
            continue
        low, high = x(spread["low"]), x(spread["high"])
        quarter, three = x(spread["quarter"]), x(spread["three_quarters"])
        parts.append(
            f'<rect x="{quarter:.1f}" y="{middle - 6:.1f}" width="{max(1.0, three - quarter):.1f}" height="12"'
            f' fill="{colour}" fill-opacity="0.22"/>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}" stroke="{colour}"'
            ' stroke-width="3.2" stroke-linecap="round"/>'
            f'<circle cx="{x(spread["median"]):.1f}" cy="{middle:.1f}" r="3.8" fill="#fff" stroke="{colour}"'
            ' stroke-width="2"/>'
        )
        words.append(f"{band}: {spread['median']:.1f} ({spread['low']:.1f} to {spread['high']:.1f})")
    label = e(f"{name}: {'; '.join(words)}" if name else "; ".join(words))
    width = _BAND_PX + _SCALE_PX + 14
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _how(document: Document) -> str:
    rules = document["rules"]
    lines = (
        "Each figure is the median of the samples of a band: the sample is the unit, since the cells of one person"
        " resemble each other.",
        "Dot: median. Bold line: its 95 % interval, from order statistics, whatever the values' distribution. Pale bar:"
        " the middle half of the samples.",
        f"A band, or a figure, with fewer than {rules['fewest_samples']} samples is not told. Samples with fewer than"
        f" {rules['fewest_leukocytes']} classified leukocytes give no shares.",
        "Surely below, surely above: the sample's whole interval lies outside the reference interval of its age band;"
        " in brackets the Clopper-Pearson interval of their share.",
        "Confidence and close calls are those of all views that the classifier was asked about, before any person's"
        " answer; a close call's first two probabilities are nearer than 0.2.",
    )
    return f"<h2>How to read it</h2><ul>{''.join(f'<li>{e(line)}</li>' for line in lines)}</ul>"
