"""A report in one of its formats."""

from __future__ import annotations

import json
from collections.abc import Mapping

from agent.report.document import Document
from agent.report.html import foot_words, render_html
from agent.report.pdf import render_pdf
from agent.report.tables import render_csv
from agent.review import KeptCell


def render(document: Document, crops: Mapping[str, KeptCell], wanted: str) -> bytes:
    """wanted: html, pdf, csv or json; text is UTF-8. Raises ConfigError: no PDF can be made here."""
    if wanted == "json":
        return json.dumps(document, indent=2, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    if wanted == "csv":
        return render_csv(document).encode("utf-8", "replace")
    html = render_html(document, crops)
    if wanted == "pdf":
        return render_pdf(html, document["notice"], foot_words(document))
    return html.encode("utf-8", "replace")
