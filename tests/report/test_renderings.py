"""Reports as HTML and CSV: whole, harmless, readable."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser

import pytest
from making import AT, make_answer, make_cell, make_crop, make_field, make_record, make_report

from agent import RESEARCH_USE_ONLY
from agent.report.document import compose
from agent.report.formats import Document
from agent.report.html import render_body, render_html
from agent.report.record import SampleRecord
from agent.report.tables import render_csv

VOID = {"meta", "img", "br", "line", "rect", "path"}


class Reader(HTMLParser):
    """Tags that are open at the end, ids that come twice, and all that points somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href"):
                self.targets.append(value or "")
            assert not name.startswith("on")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            self.handle_starttag(tag, attrs)
        else:
            self.handle_starttag(tag, attrs)
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            self.open.append(f"end of {tag}") if tag != "path" else None
            return
        assert self.open, f"</{tag}> without its beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def make_page(record: SampleRecord) -> tuple[Document, str]:
    document = compose(record, AT)
    return document, render_html(document, record.crops)


def test_the_page_is_whole_and_fetches_nothing() -> None:
    crops = {"s-1-1": make_crop(1)}
    _, page = make_page(make_record(crops=crops, answers=[make_answer(1)]))
    reader = read(page)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.targets
    assert all(target.startswith("data:image/jpeg;base64,") for target in reader.targets)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert "default-src 'none'" in page


def test_the_label_stands_at_the_top_and_in_the_footer_that_is_printed_on_every_page() -> None:
    _, page = make_page(make_record())
    assert page.count(RESEARCH_USE_ONLY) == 2
    assert "<footer>" in page
    assert "table-footer-group" in page


def test_shares_intervals_flags_and_the_corrected_column_are_there() -> None:
    document, page = make_page(make_record())
    text = read(page).text
    share = document["differential"]["shares"][0]
    assert f"{share['pct']:.1f}" in text
    assert f"{share['low_pct']:.1f} to {share['high_pct']:.1f}" in text
    assert "above, surely" in text
    assert "Corrected % *" in text
    assert "10 to 20" in text


def test_who_computed_and_by_which_thresholds_is_told_where_the_agent_told_it() -> None:
    _, page = make_page(make_record())
    assert "aarch64, Python 3.11.2, numpy 2.3.4, OpenCV 4.12.0" in page
    assert "score 0.25, probability 0.75, of being a cell 0.5" in page
    report = make_report({"round": 3})
    report["provenance"] = {
        key: report["provenance"][key] for key in report["provenance"] if key not in ("software", "thresholds")
    }
    _, page = make_page(make_record(differentials=[report]))
    assert page.count("Computed by") == 1  # of the fields, which a newer agent counted


def test_nothing_that_comes_from_outside_becomes_markup() -> None:
    evil = "<img src=x onerror=alert(1)>\"'&"
    report = make_report({"round": 3})
    report["accession"] = report["age_band"] = report["report"] = report["at"] = evil
    report["shares"][0]["class"] = report["shares"][1]["class"] = evil
    report["counts"] = {evil: 3}
    report["refused"] = {evil: 1}
    report["provenance"] = {**report["provenance"], "agent": evil, "runtime": evil}
    cells = [make_cell(1, evil), make_cell(2, evil, cell_id=evil)]
    answers = [make_answer(1, evil, evil), make_answer(2, "unidentified", evil)]
    crops = {"s-1-1": make_crop(1, evil)}
    record = make_record(
        differentials=[report], fields=[make_field(1, cells), make_field(2)], answers=answers, crops=crops
    )
    record = SampleRecord("device", evil, evil, evil, record.differentials, {"end_reason": evil, "opened_at": evil})
    for one in (
        record,
        make_record(differentials=[report], fields=[make_field(1, cells), make_field(2)], answers=answers),
    ):
        document = compose(one, AT)
        document["gallery"] = [{**picture, "class": evil, "cell_id": evil} for picture in document["gallery"]]
        reader = read(render_html(document, crops))
        assert reader.open == []
        assert all(target.startswith("data:") for target in reader.targets)
        assert evil in reader.text


def test_a_picture_that_is_gone_is_said_to_be_gone() -> None:
    record = make_record(crops={"s-1-1": make_crop(1)})
    assert "picture not here" in render_html(compose(record, AT), {})


def test_a_page_can_take_the_body_alone() -> None:
    record = make_record()
    body = render_body(compose(record, AT), {})
    assert "<html" not in body
    assert read(body).open == []


def test_a_sample_without_leukocytes_has_a_page_too() -> None:
    _, page = make_page(make_record(differentials=[make_report({"red": 5})], fields=[]))
    assert "No leukocyte was classified" in page


@pytest.mark.parametrize("count", [0, 1, 12])
def test_the_legend_names_every_class_of_the_map(count: int) -> None:
    cells = [make_cell(n, f"class-{n}") for n in range(count)]
    _, page = make_page(make_record(fields=[make_field(1, cells), make_field(2)]))
    assert len(re.findall(r"<li><span style=", page)) == count


def test_csv_has_a_line_for_each_figure_and_the_label_on_each() -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(compose(make_record(), AT)))))
    share = next(row for row in rows if row["part"] == "share" and row["name"] == "round")
    assert (share["count"], share["value"], share["flag"]) == ("30", "30.0", "high")
    assert float(share["low"]) < 30 < float(share["high"])
    assert {row["notice"] for row in rows} == {RESEARCH_USE_ONLY}
    assert {"share", "ratio", "count", "class"} <= {row["part"] for row in rows}


def test_millions_of_cells_in_a_microlitre_stand_in_figures_that_people_write() -> None:
    red = {"name": "red-cell", "count": 902, "per_ul": 4510000.0, "low_per_ul": 4220450.3, "high_per_ul": 4814250.7}
    few = {"name": "leukocyte", "count": 3, "per_ul": 7.5, "low_per_ul": 1.5, "high_per_ul": 21.9}
    report = {**make_report({"round": 30, "lobed": 70}), "per_ul": [few, red]}
    html = render_html(compose(make_record(differentials=[report]), AT), {})
    assert "<dt>red-cell in a microlitre</dt><dd>4510000 (4220450 to 4814251)</dd>" in html
    assert "<dt>leukocyte in a microlitre</dt><dd>7.5 (1.5 to 21.9)</dd>" in html
