"""A report in one of its formats."""

from __future__ import annotations

from collections.abc import Mapping

from agent.report.formats import Document, hand_out
from agent.report.html import foot_words, render_html
from agent.report.tables import render_csv
from agent.review import KeptCell


def render(document: Document, crops: Mapping[str, KeptCell], wanted: str) -> bytes:
    """wanted: html, pdf, csv or json; text is UTF-8. Raises ConfigError: no PDF can be made here."""
    return hand_out(
        document,
        wanted,
        html=lambda: render_html(document, crops),
        table=lambda: render_csv(document),
        foot=foot_words(document),
    )
