"""The figures that models are judged by, on cases with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from models.common.metrics import (
    FieldBoxes,
    accuracy_at_coverage,
    area_under_roc,
    box_overlaps,
    class_figures_by_name,
    detection_figures,
    expected_calibration_error,
    f1_curve,
    middle_class,
    middle_score,
)

CLASSES = ("WBC", "RBC")


def boxes(*rows: tuple[float, ...], width: int) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, width)


def field(found: list[tuple[float, ...]], true: list[tuple[float, ...]]) -> FieldBoxes:
    return FieldBoxes(boxes(*found, width=6), boxes(*true, width=5))


def test_overlap_of_known_boxes() -> None:
    assert box_overlaps(boxes((0, 0, 10, 10), width=4), boxes((0, 5, 10, 15), width=4))[0, 0] == pytest.approx(1 / 3)


def test_the_middle_of_a_picture_is_found_by_the_best_wanted_box_that_holds_it() -> None:
    found = boxes(
        (1, 0.9, 40, 40, 60, 60), (0, 0.3, 45, 20, 55, 31), (2, 0.2, 30, 20, 70, 60), (0, 0.8, 0, 0, 9, 9), width=6
    )
    assert middle_score(found, (0, 2), 100, 60) == pytest.approx(0.3)
    assert middle_score(found, (2,), 100, 60) == pytest.approx(0.2)
    assert middle_score(found, (0, 2), 40, 90) == 0
    assert middle_score(found, (0, 1, 2), 100, 30) == 0
    assert middle_score(boxes(width=6), (0, 2), 100, 60) == 0
    assert middle_class(found, (0, 2), 100, 60, min_score=0.25) == 0
    assert middle_class(found, (2,), 100, 60, min_score=0.15) == 2
    assert middle_class(found, (2,), 100, 60, min_score=0.25) is None


def test_a_perfect_answer_scores_one() -> None:
    figures = detection_figures([field([(0, 0.9, 0, 0, 10, 10)], [(0, 0, 0, 10, 10)])], CLASSES)
    assert figures["WBC"].map50 == figures["WBC"].map50_95 == figures["all"].map50 == pytest.approx(1)


def test_a_cell_found_twice_counts_once() -> None:
    twice = field([(0, 0.9, 0, 0, 10, 10), (0, 0.8, 0, 0, 10, 10)], [(0, 0, 0, 10, 10), (0, 50, 50, 60, 60)])
    figures = detection_figures([twice], CLASSES)
    assert figures["WBC"].map50 == pytest.approx(51 / 101)
    assert figures["WBC"].recall == pytest.approx(0.5)


def test_a_false_answer_above_the_true_one_halves_precision() -> None:
    wrong_first = field([(0, 0.9, 50, 50, 60, 60), (0, 0.8, 0, 0, 10, 10)], [(0, 0, 0, 10, 10)])
    assert detection_figures([wrong_first], CLASSES)["WBC"].map50 == pytest.approx(0.5)


@pytest.mark.parametrize("right_first", [True, False])
def test_boxes_of_one_score_stand_or_fall_together(right_first: bool) -> None:
    found = [(0, 0.9, 0, 0, 10, 10), (0, 0.9, 50, 50, 60, 60)]
    tied = field(found if right_first else found[::-1], [(0, 0, 0, 10, 10)])
    assert detection_figures([tied], CLASSES)["WBC"].map50 == pytest.approx(0.5)


def test_a_loose_box_counts_only_at_low_overlaps() -> None:
    loose = field([(0, 0.9, 0, 0, 10, 10)], [(0, 0, 0, 10, 13)])  # IoU 0.77: right at .50 to .75, six of ten
    assert detection_figures([loose], CLASSES)["WBC"].map50_95 == pytest.approx(0.6)


def test_a_missed_class_scores_zero_and_an_absent_one_is_left_out() -> None:
    figures = detection_figures([field([], [(1, 0, 0, 10, 10)])], CLASSES)
    assert figures["RBC"].map50 == 0
    assert "WBC" not in figures


def test_names_right_and_wrong_are_counted_by_class() -> None:
    figures = class_figures_by_name([("a", "a"), ("a", "b"), ("b", "b"), ("b", "missed")], ("a", "b"))
    assert figures["accuracy"] == 0.5
    assert figures["classes"]["a"] == {"n": 2, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)}
    assert figures["confusion"] == [[1, 1], [0, 1]]


def test_f1_over_thresholds_weighs_found_against_missed() -> None:
    one = field([(0, 0.9, 0, 0, 10, 10), (0, 0.4, 50, 50, 60, 60)], [(0, 0, 0, 10, 10), (0, 80, 80, 90, 90)])
    assert f1_curve([one], CLASSES, np.array([0.1, 0.5, 0.95])).tolist() == pytest.approx([2 / 4, 2 / 3, 0])


def test_a_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    confidences = np.array([0.9] * 10 + [0.6] * 10)
    is_right = np.array([True] * 9 + [False] + [True] * 6 + [False] * 4)
    assert expected_calibration_error(confidences, is_right) == pytest.approx(0)
    assert expected_calibration_error(confidences, np.zeros(20, bool)) == pytest.approx(0.75)


def test_accuracy_rises_when_the_doubtful_are_left_out() -> None:
    confidences = np.array([0.9, 0.8, 0.7, 0.6])
    figures = accuracy_at_coverage(confidences, np.array([True, True, False, False]), (1.0, 0.5))
    assert figures == {"1": 0.5, "0.5": 1.0}


def test_the_area_under_the_curve_counts_ties_half() -> None:
    assert area_under_roc(np.array([0.9, 0.8]), np.array([0.1, 0.2])) == 1
    assert area_under_roc(np.array([0.5]), np.array([0.5])) == 0.5
    assert area_under_roc(np.array([0.1]), np.array([0.9])) == 0
