"""Another slide is one that comes after an absence and lies nowhere; neither alone is enough."""

from __future__ import annotations

import pytest

from agent.analysis.slide_change import Sight, SlideWatch

SECOND = 10**9


def follow(*frames: tuple[float, Sight, bool], absence_s: float = 15) -> list[bool]:
    """frames: s, what it shows, whether it is lost."""
    watch = SlideWatch(absence_s)
    return [watch.is_another(round(at * SECOND), sight, lambda lost=lost: lost) for at, sight, lost in frames]


def test_a_field_at_no_known_place_after_an_absence_is_another_slide() -> None:
    assert follow((0, "slide", True), (1, "nothing", True), (16, "slide", True)) == [False, False, True]


def test_a_known_place_after_an_absence_is_the_same_slide() -> None:
    assert follow((0, "slide", True), (600, "slide", False), (601, "slide", True)) == [False, False, False]


def test_a_quick_move_to_an_unknown_place_is_the_same_slide() -> None:
    assert follow((0, "slide", True), (14, "slide", True), (28, "slide", True)) == [False, False, False]


def test_a_picture_that_stays_keeps_the_slide_in_view() -> None:
    standing: list[tuple[float, Sight, bool]] = [(k, "same", True) for k in range(1, 60)]
    assert not any(follow((0, "slide", True), *standing, (61, "slide", True)))


def test_an_empty_picture_that_stays_does_not() -> None:
    standing: list[tuple[float, Sight, bool]] = [(k, "same", True) for k in range(2, 20)]
    assert follow((0, "slide", True), (1, "nothing", True), *standing, (21, "slide", True))[-1]


def test_what_comes_first_and_what_comes_after_a_word_from_a_person_is_the_slide() -> None:
    watch = SlideWatch(15)
    assert not watch.is_another(0, "slide", lambda: True)
    watch.forget()
    assert not watch.is_another(100 * SECOND, "slide", lambda: True)


def test_the_place_is_looked_up_only_after_an_absence() -> None:
    watch = SlideWatch(15)
    for at_s in range(60):
        watch.is_another(at_s * SECOND, "slide", lambda: pytest.fail("looked up"))
