"""Boxes of one cell: the surest stands, the others move its sides."""

from __future__ import annotations

import numpy as np
import pytest

from agent.inference.merging import best_of_each, vote


def test_of_two_boxes_of_one_cell_the_better_stands() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [8, 0, 18, 10]], np.float32)
    assert best_of_each(boxes, np.array([1, 0, 2]), 0.7).tolist() == [1, 2]


def boxes(*rows: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 4)


def test_the_sides_are_the_mean_of_what_the_voters_at_that_place_see() -> None:
    voters = boxes((0, 0, 10, 10), (2, 0, 12, 10), (100, 0, 110, 10))
    voted = vote(voters[:1], np.array([0]), (voters, np.array([0.8, 0.4, 0.9], np.float32), np.array([0, 0, 0])))
    assert voted[0] == pytest.approx([0.4, 0, 10.4, 10])  # weights 0.64 and 0.16


def test_another_class_and_a_box_that_overlaps_too_little_have_no_say() -> None:
    voters = boxes((0, 0, 10, 10), (1, 0, 11, 10), (5, 0, 15, 10))
    voted = vote(voters[:1], np.array([0]), (voters, np.array([0.5, 0.9, 0.9], np.float32), np.array([0, 1, 0])))
    assert voted[0] == pytest.approx([0, 0, 10, 10])


def test_a_box_for_which_nobody_votes_stays() -> None:
    one, nobody = boxes((3, 4, 9, 9)), (boxes(), np.empty(0, np.float32), np.empty(0, np.intp))
    assert vote(one, np.array([1]), nobody) == pytest.approx(one)
    assert vote(boxes(), np.empty(0, np.intp), nobody).shape == (0, 4)
