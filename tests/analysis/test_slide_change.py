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


def go_on(*, off_s: float, at_s: float = 10, boots: tuple[str, str] = ("b-1", "b-1"), is_gone: bool = False) -> bool:
    """Whether the first field after a restart, at no known place, is another slide's. at_s: when one was seen last."""
    before = SlideWatch(15, kernel_boot=boots[0])
    before.is_another(round(at_s * SECOND), "slide", lambda: True)
    if is_gone:
        before.is_another(round((at_s + 1) * SECOND), "nothing", lambda: True)
    after = SlideWatch(15, before.note, boots[1])
    return after.is_another(round((at_s + off_s) * SECOND), "slide", lambda: True)


def test_a_short_restart_goes_on_with_the_slide_and_a_long_one_is_an_absence() -> None:
    assert not go_on(off_s=14)
    assert not go_on(off_s=14, is_gone=True)
    assert go_on(off_s=15)


def test_another_start_of_the_computer_is_an_absence_whatever_its_clock_says() -> None:
    assert go_on(off_s=1, boots=("b-1", "b-2"))
    assert go_on(off_s=-9, boots=("b-1", "b-2"))


def test_as_long_as_nothing_is_seen_the_note_of_the_last_start_stays() -> None:
    before = SlideWatch(15, kernel_boot="b-1")
    before.is_another(10 * SECOND, "slide", lambda: True)
    between = SlideWatch(15, before.note, "b-2")
    between.is_another(20 * SECOND, "nothing", lambda: True)
    assert between.note == before.note
    assert between.is_another(21 * SECOND, "slide", lambda: True)
    assert SlideWatch(15, between.note, "b-2").note == between.note


def test_a_picture_that_stays_over_a_restart_keeps_the_slide_in_view() -> None:
    before = SlideWatch(15, kernel_boot="b-1")
    before.is_another(10 * SECOND, "slide", lambda: True)
    after = SlideWatch(15, before.note, "b-1")
    after.is_another(20 * SECOND, "same", lambda: True)
    after.is_another(32 * SECOND, "same", lambda: True)
    assert not after.is_another(44 * SECOND, "slide", lambda: True)


@pytest.mark.parametrize("note", [None, "", "rubbish", "b-1|", "b-1|-5|in-view"])
def test_without_a_note_whatever_comes_first_is_the_slide(note: str | None) -> None:
    watch = SlideWatch(15, note, "b-1")
    assert watch.note == ""
    assert not watch.is_another(100 * SECOND, "slide", lambda: True)
