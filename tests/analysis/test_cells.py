"""Cells and counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.analysis.cells import NamingRules, cell_number, count_cells, name_cell, place_on_slide, typical_red_cell_px
from agent.domain import Box, Cell, CellStatus, Classification, Detection

RULES = NamingRules(0.5, {"WBC": ("monocyte", "lymphocyte"), "platelet": ("platelet",)}, {"platelet": 1.5})


def cell(
    detector_class: str = "WBC",
    answer: str | None = "monocyte",
    probability: float = 0.9,
    box: Box = Box(10, 10, 40, 40),  # noqa: B008  (frozen)
    red_cell_px: float | None = None,
) -> Cell:
    named = Classification(answer, probability, {answer: probability}) if answer else None
    return name_cell("s-1", Detection(box, detector_class, 0.8), named, (100, 80), RULES, red_cell_px)


def test_a_probable_name_is_accepted() -> None:
    assert (cell().class_name, cell().status) == ("monocyte", CellStatus.ACCEPTED)


def test_an_improbable_name_is_unidentified() -> None:
    assert cell(probability=0.49).status is CellStatus.UNIDENTIFIED


def test_what_is_hardly_a_cell_is_unidentified_however_probable_its_name() -> None:
    rules = replace(RULES, min_cell_probability=0.5)
    wbc = Detection(Box(10, 10, 40, 40), "WBC", 0.8)
    for cell_probability, status in ((0.49, CellStatus.UNIDENTIFIED), (0.5, CellStatus.ACCEPTED)):
        answer = Classification("monocyte", 0.99, {"monocyte": 0.99}, cell_probability)
        assert rules.believes(answer) == (status is CellStatus.ACCEPTED)
        assert name_cell("s-1", wbc, answer, (100, 80), rules).status is status


def test_the_number_of_a_cell_is_what_stands_behind_its_samples_id() -> None:
    assert (cell_number("s-17-103"), cell_number("a-1")) == (103, 1)


def test_a_name_that_contradicts_the_detector_is_unidentified() -> None:
    assert cell("platelet", "monocyte").status is CellStatus.UNIDENTIFIED
    assert cell("WBC", "platelet").status is CellStatus.UNIDENTIFIED


def test_what_the_detector_names_alone_keeps_its_score_as_probability() -> None:
    red = cell("RBC", None)
    assert (red.class_name, red.probability, red.status) == ("RBC", 0.8, CellStatus.ACCEPTED)


@pytest.mark.parametrize("box", [Box(0, 10, 9, 20), Box(10, 0.5, 20, 20), Box(80, 10, 100, 20), Box(10, 60, 20, 79.5)])
def test_a_box_at_the_frames_edge_shows_a_cut_cell(box: Box) -> None:
    assert cell(box=box).status is CellStatus.EDGE


def test_counts_hold_classes_and_the_unidentified_apart() -> None:
    cells = [cell(), cell(), cell("RBC", None), cell(probability=0.1), cell(box=Box(0, 0, 9, 9))]
    assert count_cells(cells) == {"RBC": 1, "monocyte": 3, "unidentified": 1}


def test_a_cells_place_on_the_slide_follows_stage_and_scale() -> None:
    assert place_on_slide(Box(10, 20, 30, 40), 0.5, (1000.0, -50.0)) == (1010.0, -35.0)


@pytest.mark.parametrize(("um_per_px", "stage_um"), [(None, (0.0, 0.0)), (0.5, None)])
def test_without_scale_or_stage_the_place_is_unknown(
    um_per_px: float | None, stage_um: tuple[float, float] | None
) -> None:
    assert place_on_slide(Box(10, 20, 30, 40), um_per_px, stage_um) is None


def test_where_red_cells_are_in_sight_size_decides_what_may_be_a_platelet() -> None:
    small, giant, large = Box(10, 10, 30, 30), Box(10, 10, 69, 69), Box(10, 10, 71, 71)
    assert cell("WBC", "platelet", box=small, red_cell_px=40).status is CellStatus.ACCEPTED
    assert cell("WBC", "platelet", box=giant, red_cell_px=40).status is CellStatus.ACCEPTED
    assert cell("WBC", "platelet", box=large, red_cell_px=40).status is CellStatus.UNIDENTIFIED
    assert cell("platelet", "platelet", box=large, red_cell_px=40).status is CellStatus.UNIDENTIFIED
    assert cell("WBC", "platelet", box=small, red_cell_px=None).status is CellStatus.UNIDENTIFIED


def test_the_typical_red_cell_is_the_median_of_whole_ones_and_needs_three() -> None:
    def red(side: float, x: float = 20) -> Detection:
        return Detection(Box(x, 20, x + side, 20 + side), "RBC", 0.9)

    cut, white = red(30, x=0), Detection(Box(20, 20, 90, 90), "WBC", 0.9)
    assert typical_red_cell_px([red(30), red(40), red(70), cut, white], ("WBC", "platelet"), (200, 200)) == 40
    assert typical_red_cell_px([red(30), red(40), cut, white], ("WBC", "platelet"), (200, 200)) is None
