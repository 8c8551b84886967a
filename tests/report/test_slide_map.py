"""Where fields and cells lie."""

from __future__ import annotations

from typing import Any

import pytest
from making import make_cell, make_field

from agent.report.slide_map import MOST_SPOTS, MapMaker, corners


def make_map(*fields: dict[str, Any], names: dict[str, str] | None = None, gone: frozenset[str] = frozenset()) -> Any:
    maker = MapMaker()
    for field in fields:
        maker.add(field, names or {})
    return maker.finish(gone)


def place(part: int, x: float = 0.0, y: float = 0.0, turn: float = 0.0, source: str = "registered") -> dict[str, Any]:
    where = {} if source == "unknown" else {"x_px": x, "y_px": y, "turn_deg": turn}
    return {"source": source, "part": part, **where, "confidence": 1.0}


def test_a_cell_lies_where_its_field_lies() -> None:
    fields = [
        make_field(1, [make_cell(1)], place=place(1, source="unknown")),
        make_field(2, [make_cell(2, x=20.0)], place=place(1, 90.0, 5.0)),
    ]
    (part,) = make_map(*fields)["parts"]
    assert [(cell["x_px"], cell["y_px"]) for cell in part["cells"]] == [(50.0, 50.0), (110.0, 55.0)]


def test_a_turned_field_turns_its_cells_with_it() -> None:
    fields = [make_field(1, place=place(1)), make_field(2, [make_cell(1)], place=place(1, 10.0, 20.0, 90.0))]
    (part,) = make_map(*fields)["parts"]
    assert (part["cells"][0]["x_px"], part["cells"][0]["y_px"]) == pytest.approx((-40.0, 70.0))
    assert corners(part["fields"][1])[1] == pytest.approx((10.0, 120.0))


def test_a_field_alone_at_an_unknown_place_is_listed_and_not_drawn() -> None:
    fields = [
        make_field(1, place=place(1)),
        make_field(2, place=place(1, 9.0)),
        make_field(3, place=place(2, source="unknown")),
    ]
    found = make_map(*fields, make_field(4, place=place(3)) | {"place": place(3, source="unknown")})
    assert [part["part"] for part in found["parts"]] == [1]
    assert [field["seq"] for field in found["unknown_places"]] == [3, 4]


def test_parts_that_a_field_joins_are_drawn_as_one() -> None:
    joins = {"part": 2, "x_px": 500.0, "y_px": 10.0, "turn_deg": 90.0}
    fields = [
        make_field(1, place=place(1, source="unknown")),
        make_field(2, [make_cell(1)], place=place(2, source="unknown")),
        make_field(3, [make_cell(2)], place={**place(1, 90.0), "joins": joins}),
    ]
    found = make_map(*fields)
    (part,) = found["parts"]
    assert [(field["x_px"], field["y_px"], field["turn_deg"]) for field in part["fields"]] == [
        (0.0, 0.0, 0.0),
        (500.0, 10.0, 90.0),
        (90.0, 0.0, 0.0),
    ]
    assert [(cell["x_px"], cell["y_px"]) for cell in part["cells"]] == [(450.0, 60.0), (140.0, 50.0)]
    assert found["unknown_places"] == []


def test_other_views_dirt_and_red_cells_are_not_drawn_and_a_persons_name_is() -> None:
    cells = [make_cell(1), make_cell(2, status="duplicate", counted=False), make_cell(3, status="artefact")]
    cells += [make_cell(4, probabilities={}), make_cell(5, counted=False), make_cell(6)]
    fields = [make_field(1, cells, place=place(0, source="stage"))]
    (part,) = make_map(*fields, names={"s-1-1": "lobed"}, gone=frozenset({"s-1-6"}))["parts"]
    assert [(cell["cell_id"], cell["class"]) for cell in part["cells"]] == [("s-1-1", "lobed")]


def test_beyond_what_can_be_drawn_cells_are_counted() -> None:
    cells = [make_cell(n) for n in range(MOST_SPOTS + 7)]
    found = make_map(make_field(1, cells, place=place(0, source="stage")))
    assert (len(found["parts"][0]["cells"]), found["cells_left_out"]) == (MOST_SPOTS, 7)


def test_a_field_of_an_agent_that_told_no_place_lies_at_an_unknown_one() -> None:
    field = make_field(1)
    del field["place"]
    assert make_map(field)["unknown_places"] == [{"seq": 1, "part": None, "nucleated_cells": 0}]
