"""A report as one HTML file: nothing is fetched, nothing runs; it prints with the research-use label on every page.

`render_body` is the part between <body> and </body>, for a page that shows a report among other things.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent.report.drawing import colours_of, differential_svg, part_svg
from agent.report.markup import e, facts, labelled, n, page, th
from agent.report.words import (
    FLAG_WORDS,
    STATUS_WORDS,
    concentration_words,
    counted_words,
    focus_words,
    interval_words,
    kappa_words,
    ratio_words,
    reference_words,
    refused_words,
)
from agent.review import KeptCell

Document = Mapping[str, Any]


def render_html(document: Document, crops: Mapping[str, KeptCell]) -> str:
    """The whole file. crops: by cell_id, for the gallery; what is not there is said to be missing."""
    title = f"Sample {document['sample']}: {STATUS_WORDS[document['status']]}"
    return page(title, render_body(document, crops))


def render_body(document: Document, crops: Mapping[str, KeptCell]) -> str:
    """A report's content; needs STYLE."""
    sections = (
        _head(document),
        _remarks(document),
        _differential(document),
        _counts(document),
        _review(document),
        _gallery(document, crops),
        _slide_map(document),
        _quality(document),
        _provenance(document),
    )
    return labelled(document["notice"], sections, foot_words(document))


def foot_words(document: Document) -> str:
    """What stands at the foot of each page: which report this is."""
    return f"Sample {document['sample']} · {document['report'] or 'no report number'} · {document['made_at']}"


# ------------------------------------------------------------------------------------------------------ the sections


def _head(document: Document) -> str:
    rows = (
        ("Device", f"{document['site']} / {document['device']}"),
        ("Accession", document["accession"] or "none"),
        ("Age band", document["age_band"] or "not told"),
        ("Report", f"{document['report'] or 'none yet'} ({STATUS_WORDS[document['status']]})"),
        ("Differential of", document["differential"]["at"]),
        ("Sample", f"{document['opened_at'] or '?'} to {document['ended_at'] or 'now'}"),
        ("Ended by", document["end_reason"] or "not told"),
        ("This document", f"{document['made_at']}, {document['made_by']}, from the {document['source']}"),
    )
    return f"<h1>Sample {e(document['sample'])}</h1>{facts(rows)}"


def _remarks(document: Document) -> str:
    if not document["remarks"]:
        return ""
    lines = "".join(f"<li>{e(remark)}</li>" for remark in document["remarks"])
    return f'<div class="remarks" role="note"><strong>Read this first</strong><ul>{lines}</ul></div>'


def _differential(document: Document) -> str:
    differential = document["differential"]
    shares = differential["shares"]
    if not shares:
        return "<h2>Differential</h2><p>No leukocyte was classified.</p>"
    has_corrected = any(share["corrected"] for share in shares)
    has_reference = any(share["reference"] for share in shares)
    rows = []
    for share in shares:
        cells = [
            f'<th scope="row">{e(share["class"])}</th>',
            n(share["count"]),
            n(f"{share['pct']:.1f}"),
            n(interval_words(share["low_pct"], share["high_pct"])),
        ]
        if has_corrected:
            corrected = share["corrected"]
            cells.append(
                n(
                    "-"
                    if corrected is None
                    else f"{corrected['pct']:.1f} ({interval_words(corrected['low_pct'], corrected['high_pct'])})"
                )
            )
        if has_reference:
            flag = share["flag"]
            sure = " sure" if flag in ("low", "high") else ""
            cells.append(n(reference_words(share["reference"])))
            cells.append(f'<td><span class="flag{sure}">{e(FLAG_WORDS[flag])}</span></td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = ["<th scope='col'>Class</th>", *(th(word) for word in ("Cells", "%", "95 % interval"))]
    head += [th("Corrected % *")] if has_corrected else []
    head += [th("Reference %"), "<th scope='col'>Against it</th>"] if has_reference else []
    method = e(differential["interval"]["method"])
    notes = [
        f"Of {differential['leukocytes']} classified leukocytes. Intervals: {method}, 95 %."
        " Line with ends: the interval. Grey band: reference interval."
    ]
    if has_corrected:
        notes.append(
            "* An estimate without the classifier's known confusions (white triangle), with its own interval; never"
            " the result."
        )
    if has_reference:
        sources = sorted({share["reference"]["source"] for share in shares if share["reference"]})
        notes.append(
            f"Reference intervals: {'; '.join(sources)}. “Perhaps”: the share lies outside, its interval does not."
        )
    return (
        "<h2>Differential</h2>"
        + differential_svg(shares)
        + f"<table><caption>Shares of the classified leukocytes</caption><thead><tr>{''.join(head)}</tr></thead>"
        + f"<tbody>{''.join(rows)}</tbody></table>"
        + "".join(f'<p class="small">{e(note)}</p>' for note in notes)
    )


def _counts(document: Document) -> str:
    differential = document["differential"]
    rows = [(f"{ratio['name']} for 100 leukocytes", ratio_words(ratio)) for ratio in differential["per_100_leukocytes"]]
    rows += [(f"{ratio['name']} in a field", ratio_words(ratio)) for ratio in differential["per_field"]]
    if (ratio := differential["red_cells_per_leukocyte"]) is not None:
        rows.append(("red cells for each leukocyte", ratio_words(ratio)))
    rows += [(f"{one['name']} in a microlitre", concentration_words(one)) for one in differential["per_ul"]]
    rows += [
        ("Unidentified (looked at, no name could be trusted)", str(differential["unidentified"])),
        ("Not classed (seen, never named)", str(differential["not_classed"])),
        ("All cells by class", counted_words(differential["counts"])),
    ]
    if differential["still_needed"] is not None:
        rows.append(("Leukocytes still needed for the asked interval", str(differential["still_needed"])))
    sure = "".join(
        f'<tr><th scope="row">{e(one["class"])}</th>{n(one["cells"])}{n(one["median_probability"])}'
        f"{n(one['low_margin'])}</tr>"
        for one in document["classes"]
    )
    table = (
        ""
        if not sure
        else "<h3>How sure the classifier was</h3><table><caption>Views that were looked at, by the name that it gave"
        "</caption><thead><tr><th scope='col'>Name</th>"
        + "".join(th(word) for word in ("Views", "Median probability", "Margin below 0.2"))
        + f"</tr></thead><tbody>{sure}</tbody></table>"
    )
    return f"<h2>Other counts</h2>{facts(rows)}{table}"


def _review(document: Document) -> str:
    review = document["review"]
    agreement = review["agreement"]
    rows = [("Cells that wait for an answer", "not known here" if review["open"] is None else str(review["open"]))]
    rows.append(("Cells that a person answered", str(review["answers"])))
    if review["persons"]:
        rows.append(("Answered by", ", ".join(review["persons"])))
    if not agreement["answers"]:
        return f"<h2>Review</h2>{facts(rows)}"
    rows.append(("Agreement where the model gave a name", f"{agreement['agreed']} of {agreement['named']}"))
    rows.append(("Cohen's kappa", kappa_words(agreement)))
    return f"<h2>Review</h2>{facts(rows)}{agreement_table(agreement)}"


def agreement_table(agreement: Mapping[str, Any]) -> str:
    """The model's names in rows, the person's in columns."""
    persons = sorted({person for row in agreement["table"].values() for person in row})
    head = "".join(th(person) for person in persons)
    rows = "".join(
        f'<tr><th scope="row">{e(model)}</th>{"".join(n(row.get(person, 0)) for person in persons)}</tr>'
        for model, row in agreement["table"].items()
    )
    return (
        "<table><caption>Rows: the model's name; columns: the person's. The cells are those that the model was unsure"
        " of: this is not its accuracy on all cells.</caption>"
        f"<thead><tr><th scope='col'>Model</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _gallery(document: Document, crops: Mapping[str, KeptCell]) -> str:
    shown = document["gallery"]
    if not shown:
        return "<h2>Gallery</h2><p>No pictures of cells are kept here.</p>"
    parts = []
    for name in dict.fromkeys(picture["class"] for picture in shown):
        figures = "".join(_figure(picture, crops) for picture in shown if picture["class"] == name)
        parts.append(f'<section class="kind"><h3>{e(name)}</h3><ul class="gallery">{figures}</ul></section>')
    return f"<h2>Gallery</h2>{''.join(parts)}"


def _figure(picture: Mapping[str, Any], crops: Mapping[str, KeptCell]) -> str:
    crop = crops.get(picture["cell_id"])
    words = f"{picture['cell_id']}: {picture['model']} {picture['probability']:.2f}"
    if picture["named_by"] == "person":
        words += f"; a person says {picture['class']}"
    elif picture["is_open"]:
        words += "; waits for review"
    if crop is None or not crop.jpeg:
        image = "<p>picture not here</p>"
    else:
        alternative = e(f"Cell {picture['cell_id']}, {picture['class']}")
        image = f'<img alt="{alternative}" src="data:image/jpeg;base64,{base64.b64encode(crop.jpeg).decode("ascii")}">'
    return f"<li><figure>{image}<figcaption>{e(words)}</figcaption></figure></li>"


def _slide_map(document: Document) -> str:
    found = document["slide_map"]
    names = [cell["class"] for part in found["parts"] for cell in part["cells"]]
    colours = colours_of((*(share["class"] for share in document["differential"]["shares"]), *sorted(set(names))))
    parts = []
    for part in found["parts"]:
        more = f" {part['fields_left_out']} fields are not drawn." if part["fields_left_out"] else ""
        words = f"Part {part['part']}: {len(part['fields'])} fields, {len(part['cells'])} cells.{more}"
        parts.append(f"<h3>{e(words)}</h3>{part_svg(part, colours)}")
    legend = "".join(
        f'<li><span style="background:{colours[name]}"></span>{e(name)}</li>' for name in sorted(set(names))
    )
    if legend:
        parts.append(f'<ul class="legend">{legend}</ul>')
    if found["cells_left_out"]:
        parts.append(f"<p>{found['cells_left_out']} more cells are not drawn.</p>")
    if unknown := found["unknown_places"]:
        shown = ", ".join(str(field["seq"]) for field in unknown[:60]) + (" …" if len(unknown) > 60 else "")
        parts.append(f"<p>{len(unknown)} fields at an unknown place (by number): {e(shown)}</p>")
    if not parts:
        parts.append("<p>No fields are kept here.</p>")
    words = "Frames: fields. Dots: nucleated cells and platelets, each once. How parts lie to each other is not known."
    return f'<h2>Slide map</h2><p class="small">{words}</p>{"".join(parts)}'


def _quality(document: Document) -> str:
    quality = document["quality"]
    rows = (
        ("Fields counted", f"{quality['fields']} ({quality['fields_here']} of them kept here)"),
        ("Frames refused", refused_words(quality["refused"])),
        ("Places of the fields", counted_words(quality["places"]) if quality["places"] else "not known here"),
        ("Each cell counted once", "yes" if quality["basis"] == "unique" else "not surely: see above"),
        ("Focus (thousandths)", focus_words(quality["focus"])),
        ("Pictures taken", f"{quality['first_captured_at'] or '?'} to {quality['last_captured_at'] or '?'}"),
        ("Clock followed a reference", f"{quality['clock_synchronised_fields']} of {quality['fields_here']} fields"),
    )
    return f"<h2>Quality</h2>{facts(rows)}"


def _provenance(document: Document) -> str:
    provenance = document["provenance"]
    history = "".join(
        f'<tr><th scope="row">{e(report["report"] or "running")}</th><td>{e(STATUS_WORDS[report["status"]])}</td>'
        f"<td>{e(report['at'])}</td><td>{e(report['supersedes'] or '-')}</td>{n(report['amendments'])}</tr>"
        for report in document["history"]
    )
    others = "".join(f"<h3>In {other['fields']} fields</h3>{facts(_who(other))}" for other in provenance["others"])
    return (
        f"<h2>Provenance</h2>{facts(_who(provenance))}{others}<h3>Reports of this sample</h3>"
        "<table><thead><tr><th scope='col'>Report</th><th scope='col'>Status</th><th scope='col'>At</th>"
        f"<th scope='col'>Supersedes</th>{th('Names changed')}</tr></thead><tbody>{history}</tbody></table>"
    )


# --------------------------------------------------------------------------------------------------------- the parts


def _who(provenance: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    def model(role: str) -> str:
        one = provenance[role]
        return f"{one['name']} {one['version']}, SHA-256 {one['sha256']}"

    return (
        ("Agent", str(provenance["agent"])),
        ("Detector", model("detector")),
        ("Classifier", model("classifier")),
        ("Runtime", f"{provenance['runtime']}, {provenance['delegate']}"),
        ("Configuration", f"SHA-256 {provenance['config_sha256']}"),
        *_computed(provenance),
    )


def _computed(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What an agent of today tells besides."""
    if software := provenance.get("software"):
        words = f"{software['machine']}, Python {software['python']}, numpy {software['numpy']}"
        yield "Computed by", f"{words}, OpenCV {software['opencv']}"
    if limits := provenance.get("thresholds"):
        words = f"score {limits['min_score']:g}, probability {limits['min_probability']:g}"
        yield "Thresholds", f"{words}, of being a cell {limits['min_cell_probability']:g}"
        yield "Rules", f"SHA-256 {limits['rules_sha256']}"
