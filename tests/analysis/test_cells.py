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


WEIGHED = replace(RULES, contradicted={"WBC": 0.1, "platelet": 0.01})


def answer(**shares: float) -> Classification:
    best = max(shares, key=shares.__getitem__)
    return Classification(best, shares[best], shares)


def test_both_models_are_heard_by_bayes_rule() -> None:
    """The detector, which calls one platelet in ten a white cell, turns a doubtful platelet into the next best name."""
    white = Detection(Box(10, 10, 40, 40), "WBC", 0.8)
    told = WEIGHED.weigh(answer(platelet=0.8, lymphocyte=0.16, monocyte=0.04), white)
    assert told.class_name == "lymphocyte"
    assert told.probabilities == pytest.approx(
        {"platelet": 0.08 / 0.28, "lymphocyte": 0.16 / 0.28, "monocyte": 0.04 / 0.28}
    )
    assert told.probability == told.probabilities["lymphocyte"]
    doubtful = name_cell("s-1", white, answer(platelet=0.8, lymphocyte=0.16, monocyte=0.04), (100, 80), WEIGHED)
    assert (doubtful.class_name, doubtful.status) == ("lymphocyte", CellStatus.ACCEPTED)
    sure = name_cell("s-1", white, answer(platelet=0.99, lymphocyte=0.01), (100, 80), WEIGHED)
    assert (sure.class_name, sure.status) == ("platelet", CellStatus.UNIDENTIFIED)


def test_a_name_that_nothing_contradicts_is_told_as_it_was_said() -> None:
    white, said = Detection(Box(10, 10, 40, 40), "WBC", 0.8), answer(lymphocyte=0.7, monocyte=0.3)
    assert WEIGHED.weigh(said, white) is said
    assert RULES.weigh(answer(platelet=0.8, lymphocyte=0.2), white).class_name == "platelet"  # nobody knows the weight


def test_a_platelet_of_a_platelets_size_is_not_weighed_down_and_a_large_one_is() -> None:
    said = answer(platelet=0.8, lymphocyte=0.2)
    assert WEIGHED.weigh(said, Detection(Box(10, 10, 30, 30), "WBC", 0.8), 40) is said
    assert WEIGHED.weigh(said, Detection(Box(10, 10, 71, 71), "WBC", 0.8), 40).class_name == "lymphocyte"


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
