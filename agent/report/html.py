"""A report as one HTML file: nothing is fetched, nothing runs; it prints with the research-use label on every page.

`render_body` is the part between <body> and </body>, for a page that shows a report among other things.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from agent.report.drawing import colours_of, differential_svg, part_svg
from agent.report.words import (
    FLAG_WORDS,
    STATUS_WORDS,
    counted_words,
    focus_words,
    interval_words,
    kappa_words,
    ratio_words,
    reference_words,
    refused_words,
)
from agent.review import KeptCell

STYLE = """
:root{font:15px/1.45 system-ui,"Segoe UI",Roboto,"Noto Sans",sans-serif;color:#111;background:#fff}
body{margin:0}
.hv{display:table;width:100%;max-width:60rem;margin:0 auto;box-sizing:border-box;padding:0 1rem}
.hv>header,.hv>main{display:block}
.hv>footer{display:table-footer-group;break-inside:avoid}
.ruo{margin:.6rem 0;padding:.35rem .7rem;border:2px solid #a40000;color:#a40000;font-weight:700;text-align:center}
h1{font-size:1.6rem;margin:.6rem 0 .2rem}
h2{font-size:1.15rem;margin:1.5rem 0 .4rem;border-bottom:1px solid #999;break-after:avoid}
h3{font-size:1rem;margin:.9rem 0 .3rem;break-after:avoid}
table{border-collapse:collapse;width:100%;margin:.3rem 0}
caption{text-align:left;font-size:.87rem;color:#333;padding:.2rem 0}
th,td{padding:.22rem .5rem;border-bottom:1px solid #ccc;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr{break-inside:avoid}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:.4rem 0}
dt{color:#333}dd{margin:0;overflow-wrap:anywhere}
.flag{font-weight:700}.flag.sure{color:#a40000}
.remarks{border-left:4px solid #b36b00;background:#fff6e5;padding:.3rem .8rem;margin:.6rem 0}
.remarks ul{margin:.2rem 0;padding-left:1.1rem}
svg.chart{width:100%;max-width:680px;height:auto}svg text{font-size:13px;fill:#111}svg .tick{font-size:11px;fill:#444}
svg.map{width:100%;height:auto;border:1px solid #bbb}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;list-style:none;font-size:.9rem}
.legend span{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;margin-right:.35rem}
.gallery{display:flex;flex-wrap:wrap;gap:.5rem;padding:0;list-style:none}
.gallery figure{margin:0;width:7.2rem;break-inside:avoid}
.gallery img{width:7.2rem;height:7.2rem;object-fit:contain;border:1px solid #bbb;background:#f4f4f4}
.gallery figcaption{font-size:.75rem;overflow-wrap:anywhere}
.small{font-size:.87rem;color:#333}
code{font:.87rem ui-monospace,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
@page{size:A4;margin:14mm 13mm}
@media print{:root{font-size:10.5pt}.hv{max-width:none;padding:0}svg.map{max-height:150mm}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""

Document = Mapping[str, Any]


def render_html(document: Document, crops: Mapping[str, KeptCell]) -> str:
    """The whole file. crops: by cell_id, for the gallery; what is not there is said to be missing."""
    title = f"Sample {document['sample']}: {STATUS_WORDS[document['status']]}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
        " style-src 'unsafe-inline'\">\n"
        f"<title>{_e(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{render_body(document, crops)}\n</body>\n</html>\n"
    )


def render_body(document: Document, crops: Mapping[str, KeptCell]) -> str:
    """A report's content; needs STYLE."""
    notice = _e(document["notice"])
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
    foot = (
        f"Sample {_e(document['sample'])} · {_e(document['report'] or 'no report number')} · {_e(document['made_at'])}"
    )
    return (
        f'<div class="hv"><header><p class="ruo" role="note">{notice}</p></header>\n<main>'
        + "\n".join(section for section in sections if section)
        + f'</main>\n<footer><p class="ruo">{notice} <span class="small">{foot}</span></p></footer></div>'
    )


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
    return f"<h1>Sample {_e(document['sample'])}</h1>{_facts(rows)}"


def _remarks(document: Document) -> str:
    if not document["remarks"]:
        return ""
    lines = "".join(f"<li>{_e(remark)}</li>" for remark in document["remarks"])
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
            f'<th scope="row">{_e(share["class"])}</th>',
            _n(share["count"]),
            _n(f"{share['pct']:.1f}"),
            _n(interval_words(share["low_pct"], share["high_pct"])),
        ]
        if has_corrected:
            corrected = share["corrected"]
            cells.append(
                _n(
                    "-"
                    if corrected is None
                    else f"{corrected['pct']:.1f} ({interval_words(corrected['low_pct'], corrected['high_pct'])})"
                )
            )
        if has_reference:
            flag = share["flag"]
            sure = " sure" if flag in ("low", "high") else ""
            cells.append(_n(reference_words(share["reference"])))
            cells.append(f'<td><span class="flag{sure}">{_e(FLAG_WORDS[flag])}</span></td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = ["<th scope='col'>Class</th>", *(_th(word) for word in ("Cells", "%", "95 % interval"))]
    head += [_th("Corrected % *")] if has_corrected else []
    head += [_th("Reference %"), "<th scope='col'>Against it</th>"] if has_reference else []
    method = _e(differential["interval"]["method"])
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
        + "".join(f'<p class="small">{_e(note)}</p>' for note in notes)
    )


def _counts(document: Document) -> str:
    differential = document["differential"]
    rows = [(f"{ratio['name']} for 100 leukocytes", ratio_words(ratio)) for ratio in differential["per_100_leukocytes"]]
    rows += [(f"{ratio['name']} in a field", ratio_words(ratio)) for ratio in differential["per_field"]]
    if (ratio := differential["red_cells_per_leukocyte"]) is not None:
        rows.append(("red cells for each leukocyte", ratio_words(ratio)))
    rows += [
        (f"{one['name']} in a microlitre", f"{one['per_ul']:g} ({one['low_per_ul']:g} to {one['high_per_ul']:g})")
        for one in differential["per_ul"]
    ]
    rows += [
        ("Unidentified (looked at, no name could be trusted)", str(differential["unidentified"])),
        ("Not classed (seen, never named)", str(differential["not_classed"])),
        ("All cells by class", counted_words(differential["counts"])),
    ]
    if differential["still_needed"] is not None:
        rows.append(("Leukocytes still needed for the asked interval", str(differential["still_needed"])))
    sure = "".join(
        f'<tr><th scope="row">{_e(one["class"])}</th>{_n(one["cells"])}{_n(one["median_probability"])}'
        f"{_n(one['low_margin'])}</tr>"
        for one in document["classes"]
    )
    table = (
        ""
        if not sure
        else "<h3>How sure the classifier was</h3><table><caption>Views that were looked at, by the name that it gave"
        "</caption><thead><tr><th scope='col'>Name</th>"
        + "".join(_th(word) for word in ("Views", "Median probability", "Margin below 0.2"))
        + f"</tr></thead><tbody>{sure}</tbody></table>"
    )
    return f"<h2>Other counts</h2>{_facts(rows)}{table}"


def _review(document: Document) -> str:
    review = document["review"]
    agreement = review["agreement"]
    rows = [("Cells that wait for an answer", "not known here" if review["open"] is None else str(review["open"]))]
    rows.append(("Cells that a person answered", str(review["answers"])))
    if review["persons"]:
        rows.append(("Answered by", ", ".join(review["persons"])))
    if not agreement["answers"]:
        return f"<h2>Review</h2>{_facts(rows)}"
    rows.append(("Agreement where the model gave a name", f"{agreement['agreed']} of {agreement['named']}"))
    rows.append(("Cohen's kappa", kappa_words(agreement)))
    return f"<h2>Review</h2>{_facts(rows)}{agreement_table(agreement)}"


def agreement_table(agreement: Mapping[str, Any]) -> str:
    """The model's names in rows, the person's in columns."""
    persons = sorted({person for row in agreement["table"].values() for person in row})
    head = "".join(_th(person) for person in persons)
    rows = "".join(
        f'<tr><th scope="row">{_e(model)}</th>{"".join(_n(row.get(person, 0)) for person in persons)}</tr>'
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
        parts.append(f'<h3>{_e(name)}</h3><ul class="gallery">{figures}</ul>')
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
        alternative = _e(f"Cell {picture['cell_id']}, {picture['class']}")
        image = f'<img alt="{alternative}" src="data:image/jpeg;base64,{base64.b64encode(crop.jpeg).decode("ascii")}">'
    return f"<li><figure>{image}<figcaption>{_e(words)}</figcaption></figure></li>"


def _slide_map(document: Document) -> str:
    found = document["slide_map"]
    names = [cell["class"] for part in found["parts"] for cell in part["cells"]]
    colours = colours_of((*(share["class"] for share in document["differential"]["shares"]), *sorted(set(names))))
    parts = []
    for part in found["parts"]:
        more = f" {part['fields_left_out']} fields are not drawn." if part["fields_left_out"] else ""
        words = f"Part {part['part']}: {len(part['fields'])} fields, {len(part['cells'])} cells.{more}"
        parts.append(f"<h3>{_e(words)}</h3>{part_svg(part, colours)}")
    legend = "".join(
        f'<li><span style="background:{colours[name]}"></span>{_e(name)}</li>' for name in sorted(set(names))
    )
    if legend:
        parts.append(f'<ul class="legend">{legend}</ul>')
    if found["cells_left_out"]:
        parts.append(f"<p>{found['cells_left_out']} more cells are not drawn.</p>")
    if unknown := found["unknown_places"]:
        shown = ", ".join(str(field["seq"]) for field in unknown[:60]) + (" …" if len(unknown) > 60 else "")
        parts.append(f"<p>{len(unknown)} fields at an unknown place (by number): {_e(shown)}</p>")
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
    return f"<h2>Quality</h2>{_facts(rows)}"


def _provenance(document: Document) -> str:
    provenance = document["provenance"]
    history = "".join(
        f'<tr><th scope="row">{_e(report["report"] or "running")}</th><td>{_e(STATUS_WORDS[report["status"]])}</td>'
        f"<td>{_e(report['at'])}</td><td>{_e(report['supersedes'] or '-')}</td>{_n(report['amendments'])}</tr>"
        for report in document["history"]
    )
    others = "".join(f"<h3>In {other['fields']} fields</h3>{_facts(_who(other))}" for other in provenance["others"])
    return (
        f"<h2>Provenance</h2>{_facts(_who(provenance))}{others}<h3>Reports of this sample</h3>"
        "<table><thead><tr><th scope='col'>Report</th><th scope='col'>Status</th><th scope='col'>At</th>"
        f"<th scope='col'>Supersedes</th>{_th('Amended cells')}</tr></thead><tbody>{history}</tbody></table>"
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
    )


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{_e(name)}</dt><dd>{_e(words)}</dd>' for name, words in rows)}</dl>"


def _e(words: object) -> str:
    return escape(str(words), quote=True)


def _n(words: object) -> str:
    return f'<td class="n">{_e(words)}</td>'


def _th(words: str) -> str:
    return f'<th scope="col" class="n">{_e(words)}</th>'
