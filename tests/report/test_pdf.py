"""A PDF says what the page says, on every sheet for research use, in vectors, and fetches nothing."""

from __future__ import annotations

import builtins
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from making import AT, make_answer, make_cell, make_crop, make_field, make_record, make_report

from agent import RESEARCH_USE_ONLY
from agent.errors import ConfigError
from agent.report.document import compose
from agent.report.html import render_html
from agent.report.pdf import render_pdf
from agent.report.record import SampleRecord
from agent.report.render import render
from agent.report.signature import open_key, sign, verify

pypdf = pytest.importorskip("pypdf")


@pytest.fixture(autouse=True, scope="module")
def _pango() -> None:
    try:
        import weasyprint  # noqa: F401 - whether it can be loaded
    except (ImportError, OSError) as error:
        pytest.skip(f"no PDF can be made here: {error}")


class Words(HTMLParser):
    """The text of a page, without its style and what its drawings say to screen readers."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 - HTMLParser's
        if tag in ("style", "head", "title", "desc", "footer"):
            self._hidden.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden and self._hidden[-1] == tag:
            self._hidden.pop()

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words += re.findall(r"\w+(?:\.\d+)?", data)


def words_of(html: str) -> list[str]:
    reader = Words()
    reader.feed(html)
    return reader.words


def make_pdf(record: SampleRecord) -> tuple[Any, str]:
    """The PDF, opened, and the page that it was made from."""
    document = compose(record, AT)
    return pypdf.PdfReader(io.BytesIO(render(document, record.crops, "pdf"))), render_html(document, record.crops)


def make_full_record() -> SampleRecord:
    cells = [make_cell(n, ("round", "lobed", "young")[n % 3], x=10.0 * n) for n in range(9)]
    return make_record(
        differentials=[
            make_report({"round": 31, "lobed": 66, "red": 412, "young": 3, "plate": 57, "unidentified": 2}),
        ],
        fields=[make_field(1, cells), make_field(2, [make_cell(20, "lobed")])],
        answers=[make_answer(1, "round", "lobed")],
    )


def text_of(pdf: Any) -> str:
    return " ".join(page.extract_text() for page in pdf.pages)


def test_every_word_and_figure_of_the_page_stands_in_the_pdf() -> None:
    pdf, html = make_pdf(make_full_record())
    # A long word may be cut at the end of a line: what is looked for is looked for without blanks.
    told = re.sub(r"\s", "", text_of(pdf))
    missing = {word for word in words_of(html) if word not in told}
    assert missing == set()
    figures = [word for word in words_of(html) if re.fullmatch(r"\d+\.\d+", word)]
    assert len(figures) > 30
    document = compose(make_full_record(), AT)
    for share in document["differential"]["shares"]:
        assert f"{share['pct']:.1f}{share['low_pct']:.1f}to{share['high_pct']:.1f}" in told


def test_the_label_the_sample_and_the_number_stand_on_every_page() -> None:
    crops = {f"s-1-{n}": make_crop(n, f"class-{n % 9}") for n in range(60)}
    pdf, _ = make_pdf(make_record(crops=crops))
    assert len(pdf.pages) > 1
    for number, page in enumerate(pdf.pages, start=1):
        text = page.extract_text()
        assert RESEARCH_USE_ONLY in text
        assert "Sample s-1 · s-1-r1" in text
        assert f"Page {number} of {len(pdf.pages)}" in text


def drawn(pdf: Any) -> str:
    """The drawing commands of all pages, and of what they draw again."""
    streams = [page.get_contents().get_data() for page in pdf.pages]
    for page in pdf.pages:
        for one in page["/Resources"].get("/XObject", {}).values():
            if one.get_object()["/Subtype"] == "/Form":
                streams.append(one.get_object().get_data())
    return b"\n".join(streams).decode("latin-1")


def test_chart_and_map_are_lines_and_not_pixels() -> None:
    without, _ = make_pdf(make_record(differentials=[make_report({"red": 3})], fields=[]))
    pdf, _ = make_pdf(make_full_record())
    assert sum(len(page.images) for page in pdf.pages) == 0
    # Curves are only in the dots and the bars' round ends, lines in the frames, the whiskers and the axes.
    assert drawn(pdf).count(" l\n") > drawn(without).count(" l\n") + 20


def test_the_same_document_gives_the_same_bytes() -> None:
    document = compose(make_full_record(), AT)
    assert render(document, {}, "pdf") == render(document, {}, "pdf")


def test_a_pdf_is_signed_as_the_others_are(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    document = compose(make_record(), AT)
    pdf = render(document, {}, "pdf")
    signature = sign(pdf, "s-1", open_key(tmp_path / "key.pem", create=True), at=AT)
    assert verify(pdf, signature).sample == "s-1"


def test_nothing_is_fetched_and_names_from_outside_stay_text(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("SECRETWORD")
    evil = f'"}} x <img src="file://{secret}"> \\ \n @import url(file://{secret});'
    html = f'<html><head><title>t</title></head><body><img src="file://{secret}" alt="picture">here</body></html>'
    pdf = pypdf.PdfReader(io.BytesIO(render_pdf(html, RESEARCH_USE_ONLY, evil)))
    text = text_of(pdf)
    assert "SECRETWORD" not in text
    assert "@import" in text
    assert "Page 1 of 1" in " ".join(text.split())  # the margins after it still are what they were


def test_without_the_library_it_is_said_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    with pytest.raises(ConfigError, match=r"hematovision-agent\[report\]"):
        render(compose(make_record(), AT), {}, "pdf")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (OSError("cannot load library 'libpango-1.0-0'"), "libpango-1.0-0'; `apt install"),
        (UserWarning("No fonts configured in FontConfig. Expect ugly output."), "no font is here"),
    ],
)
def test_without_pango_or_a_font_it_is_said_what_brings_them(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, words: str
) -> None:
    real = builtins.__import__

    def broken(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "weasyprint":
            raise failure
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ConfigError) as told:
        render(compose(make_record(), AT), {}, "pdf")
    assert words in str(told.value)
