"""Which numbers are missing: against a model that simply keeps all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.central.numbers import Numbering, Run, Span, beginning_of_another, merged


def taken(*numbers: tuple[int, int]) -> Numbering:
    numbering = Numbering(0)
    for boot, seq in numbers:
        assert not numbering.contradicts(boot, seq)
        numbering.take(boot, seq)
    return numbering


def test_nothing_is_complete_before_the_first_number() -> None:
    numbering = taken((1, 2), (1, 3))
    assert (numbering.received_seq, numbering.complete_boot) == (0, 0)
    assert numbering.holes() == [Span(1, 1)]


def test_complete_ends_at_the_first_hole_and_moves_on_when_it_is_filled() -> None:
    numbering = taken((1, 1), (1, 2), (2, 4), (2, 5))
    assert (numbering.complete_boot, numbering.received_seq) == (1, 2)
    assert numbering.holes() == [Span(3, 3)]
    assert numbering.take(1, 3)
    assert (numbering.complete_boot, numbering.received_seq) == (2, 5)
    assert numbering.holes() == []


def test_a_number_is_new_once() -> None:
    numbering = taken((1, 1), (1, 3))
    assert not numbering.take(1, 1)
    assert not numbering.take(1, 3)


def test_what_is_given_up_is_passed_over_but_never_acknowledged() -> None:
    numbering = taken((1, 4), (1, 5), (1, 9))
    numbering.give_up(Span(1, 3))
    assert (numbering.complete_seq, numbering.received_seq) == (5, 5)
    numbering.give_up(Span(6, 7))
    assert (numbering.complete_seq, numbering.received_seq) == (7, 5)
    assert numbering.holes() == [Span(8, 8)]


def test_what_was_given_up_may_come_after_all() -> None:
    numbering = taken((1, 4))
    numbering.give_up(Span(1, 3))
    assert numbering.take(1, 2)
    assert not numbering.take(1, 2)
    assert numbering.gone == [Span(1, 1), Span(3, 3)]


@pytest.mark.parametrize(
    ("before", "then", "begun"),
    [
        ([(5, 1), (5, 2)], (6, 1), 6),
        ([(5, 1), (5, 2)], (6, 2), 6),
        ([(5, 1), (6, 50)], (6, 1), 6),  # the first of the new numbering that came was not its first
        ([(5, 1), (6, 50)], (5, 60), 6),
    ],
)
def test_a_lower_number_under_a_higher_boot_begins_another_numbering(
    before: list[tuple[int, int]], then: tuple[int, int], begun: int
) -> None:
    numbering = taken(*before)
    assert numbering.contradicts(*then)
    assert beginning_of_another([Run(seq, seq, boot) for boot, seq in before], *then) == begun


def test_numbers_that_rise_with_the_boots_are_one_numbering() -> None:
    assert not taken((5, 1), (5, 2)).contradicts(6, 3)
    assert not taken((5, 1), (6, 9)).contradicts(5, 4)


def test_spans_are_merged() -> None:
    assert merged([Span(5, 6), Span(1, 2), Span(3, 3), Span(6, 9)]) == [Span(1, 3), Span(5, 9)]


@given(
    boots=st.lists(st.integers(1, 3), min_size=1, max_size=25),
    order=st.randoms(use_true_random=False),
    given_up=st.lists(st.tuples(st.integers(1, 25), st.integers(0, 5)), max_size=3),
    repeats=st.lists(st.integers(0, 24), max_size=10),
)
def test_in_any_order_with_repeats_and_losses_it_says_what_a_set_of_numbers_says(
    boots: list[int], order: object, given_up: list[tuple[int, int]], repeats: list[int]
) -> None:
    sent = [(boot, seq) for seq, boot in enumerate(sorted(boots), 1)]
    arriving = [*sent, *(sent[index % len(sent)] for index in repeats)]
    order.shuffle(arriving)  # type: ignore[attr-defined]
    numbering, seen, gone = Numbering(0), set(), set()
    for index, (boot, seq) in enumerate(arriving):
        assert not numbering.contradicts(boot, seq)
        assert numbering.take(boot, seq) == (seq not in seen)
        seen.add(seq)
        gone.discard(seq)
        if index < len(given_up):
            first, length = given_up[index]
            span = Span(first, min(first + length, max(seen)))
            if span.first <= span.last:
                numbering.give_up(span)
                gone |= set(range(span.first, span.last + 1)) - seen
        complete = 0
        while complete + 1 in seen | gone:
            complete += 1
        assert numbering.complete_seq == complete
        assert numbering.received_seq == max((one for one in seen if one <= complete), default=0)
        missing = {one for hole in numbering.holes() for one in range(hole.first, hole.last + 1)}
        assert missing == set(range(1, max(seen) + 1)) - seen - gone
        if numbering.received_seq:
            assert numbering.complete_boot == {seq: boot for boot, seq in sent}[numbering.received_seq]
