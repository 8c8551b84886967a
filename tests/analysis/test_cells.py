"""Cells and counts."""

from __future__ import annotations

import pytest

from agent.analysis.cells import count_cells, name_cell, place_on_slide
from agent.domain import Box, Cell, CellStatus, Classification, Detection

AGREEING = {"WBC": ("monocyte", "lymphocyte"), "platelet": ("platelet",)}


def cell(
    detector_class: str = "WBC",
    answer: str | None = "monocyte",
    probability: float = 0.9,
    box: Box = Box(10, 10, 40, 40),  # noqa: B008  (frozen)
) -> Cell:
    named = Classification(answer, probability, {answer: probability}) if answer else None
    return name_cell("s-1", Detection(box, detector_class, 0.8), named, (100, 80), 0.5, AGREEING)


def test_a_probable_name_is_accepted() -> None:
    assert (cell().class_name, cell().status) == ("monocyte", CellStatus.ACCEPTED)


def test_an_improbable_name_is_unidentified() -> None:
    assert cell(probability=0.49).status is CellStatus.UNIDENTIFIED


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
