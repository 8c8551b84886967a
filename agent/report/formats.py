"""What every document of ours begins with, and the formats in which it is handed out."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from agent import RESEARCH_USE_ONLY, __version__
from agent.delivery.messages import rfc3339_ms
from agent.report.pdf import render_pdf

Document = dict[str, Any]


def document_head(schema: str, source: str, at: datetime) -> Document:
    """What it is, that it is for research, and who made it when from what."""
    return {
        "schema": schema,
        "notice": RESEARCH_USE_ONLY,
        "ruo": True,
        "made_at": rfc3339_ms(at),
        "made_by": f"hematovision-agent {__version__}",
        "source": source,
    }


def hand_out(document: Document, wanted: str, *, html: Callable[[], str], table: Callable[[], str], foot: str) -> bytes:
    """wanted: html, pdf, csv or json; text is UTF-8. foot: of the pages on paper. Raises ConfigError: no PDF here."""
    if wanted == "json":
        return json.dumps(document, indent=2, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    if wanted == "pdf":
        return render_pdf(html(), document["notice"], foot)
    return (table() if wanted == "csv" else html()).encode("utf-8", "replace")
