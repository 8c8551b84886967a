"""The devices beside each other as one JSON object, and its renderings: HTML, PDF, CSV.

compare_fleet --compose_fleet--> document --render_fleet--> html | pdf | csv | json
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from agent.analysis.drift import figure_of
from agent.analysis.fleet import FEWEST_DEVICES, FleetDevice, Place, Standing, standing_facts
from agent.report.formats import Document, document_head, hand_out
from agent.report.markup import e, facts, labelled, n, page, th
from agent.report.words import counted_words

SCHEMA = "hematovision/fleet/1"

COLUMNS = (
    *("site", "device", "models", "figure", "unit"),
    *("here", "others", "low", "high", "devices", "stands_out", "notice"),
)


def compose_fleet(
    devices: Sequence[FleetDevice],
    standings: Mapping[Place, Sequence[Standing]],
    left_out: Mapping[str, int],
    site: str | None,
    at: datetime,
) -> Document:
    """The comparison as of now. left_out: devices by reason; site: what was asked for, None = all."""
    return {
        **document_head(SCHEMA, "collector", at),
        "selection": {"site": site},
        "rules": {"fewest_devices": FEWEST_DEVICES},
        "left_out": dict(left_out),
        "devices": [
            {
                "site": device.place[0],
                "device": device.place[1],
                "models": device.models,
                "figures": [
                    {"figure": one.name, **standing_facts(one), "stands_out": one.stands_out}
                    for one in standings[device.place]
                ],
            }
            for device in devices
        ],
    }


def render_fleet(document: Document, wanted: str) -> bytes:
    """wanted: html, pdf, csv or json; text is UTF-8. Raises ConfigError: no PDF can be made here."""
    return hand_out(
        document,
        wanted,
        html=lambda: _render_html(document),
        table=lambda: _render_csv(document),
        foot=_foot(document),
    )


def _render_csv(document: Document) -> str:
    """One line for each device and figure."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for device in document["devices"]:
        who = {key: device[key] for key in ("site", "device", "models")}
        for one in device["figures"]:
            said = {None: "too few devices", True: "yes", False: "no"}[one["stands_out"]]
            writer.writerow({**who, **one, "stands_out": said, "notice": document["notice"]})
    return text.getvalue()


def _render_html(document: Document) -> str:
    site = document["selection"]["site"]
    rows = (
        ("Devices compared", str(len(document["devices"]))),
        ("Asked for", "all sites" if site is None else f"site {site}"),
        ("Left out", counted_words(document["left_out"]) if document["left_out"] else "none"),
        ("This document", f"{document['made_at']}, {document['made_by']}, from the {document['source']}"),
    )
    names = dict.fromkeys(one["figure"] for device in document["devices"] for one in device["figures"])
    sections = [f"<h1>The microscopes beside each other</h1>{facts(rows)}", *(_table(name, document) for name in names)]
    sections.append(f"<h2>How to read it</h2><ul>{''.join(f'<li>{e(line)}</li>' for line in _how(document))}</ul>")
    return page("The microscopes beside each other", labelled(document["notice"], sections, _foot(document)))


def _foot(document: Document) -> str:
    return f"The microscopes beside each other · {len(document['devices'])} devices · {document['made_at']}"


def _table(name: str, document: Document) -> str:
    figure = figure_of(name)
    head = "".join(th(words) for words in ("here", "median of the others", "stands out below", "above", "others", ""))
    body = "".join(_rows(name, document))
    about = f"{figure.unit}. If it stands out: {figure.look_at}."
    return (
        f'<h2>{e(figure.words.capitalize())}</h2><p class="small">{e(about)}</p>'
        f'<table><thead><tr><th scope="col">device</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _rows(name: str, document: Document) -> Iterator[str]:
    said = {None: "too few devices", True: "STANDS OUT", False: ""}
    for device in document["devices"]:
        for one in device["figures"]:
            if one["figure"] == name:
                values = "".join(n(_number(one[key])) for key in ("here", "others", "low", "high"))
                who = f'<th scope="row">{e(device["site"])}/{e(device["device"])}</th>'
                yield f"<tr>{who}{values}{n(one['devices'])}<td>{said[one['stands_out']]}</td></tr>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _how(document: Document) -> Iterator[str]:
    yield (
        "Each figure is the device's own moving average over its last slides (drift in its health message), held"
        " against the median of the other devices."
    )
    yield (
        "A device stands out when it is further from that median than 5 robust standard deviations of the others"
        " (1.4826 times their median absolute deviation), times 1 + 3 / (their number), and than its own slides differ"
        " by chance."
    )
    yield (
        f"With fewer than {document['rules']['fewest_devices']} devices nobody is judged. Class mix, confidence and"
        " unidentified cells are compared among devices with the same models only; focus is not compared."
    )
    yield "Devices serve different patients: a class mix that stands out may be the ward's."
