"""A report in one of its formats."""

from __future__ import annotations

import json
from collections.abc import Mapping

from agent.report.document import Document
from agent.report.html import render_html
from agent.report.tables import render_csv
from agent.review import KeptCell


def render(document: Document, crops: Mapping[str, KeptCell], wanted: str) -> bytes:
    """wanted: html, csv or json. UTF-8."""
    if wanted == "json":
        return json.dumps(document, indent=2, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    if wanted == "csv":
        return render_csv(document).encode("utf-8", "replace")
    return render_html(document, crops).encode("utf-8", "replace")
