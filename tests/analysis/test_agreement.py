"""Persons against the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent.analysis.agreement import FEWEST_FOR_CLASS, Answer, cohens_kappa, measure_agreement


def answers(**pairs: int) -> Iterator[Answer]:
    number = 0
    for words, count in pairs.items():
        model, _, person = words.partition("_")
        for _ in range(count):
            number += 1
            yield Answer(f"s-{number}", model, person)


def test_kappa_is_that_of_a_worked_example() -> None:
    """Two raters, 50 proposals: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: po 0.7, pe 0.5, kappa 0.4."""
    kappa, error = cohens_kappa({("y", "y"): 20, ("y", "n"): 5, ("n", "y"): 10, ("n", "n"): 15}) or (0, 0)
    assert kappa == pytest.approx(0.4)
    assert error == pytest.approx((0.7 * 0.3 / (50 * 0.25)) ** 0.5)


def test_kappa_is_one_for_agreement_throughout_and_none_where_chance_gives_all_of_it() -> None:
    assert cohens_kappa({("a", "a"): 3, ("b", "b"): 4}) == (1.0, 0.0)
    assert cohens_kappa({("a", "a"): 3}) is None
    assert cohens_kappa({}) is None


def test_below_thirty_named_cells_no_kappa_is_told() -> None:
    assert measure_agreement(answers(a_a=20, b_b=9, unidentified_a=40)).kappa is None
    assert measure_agreement(answers(a_a=20, b_b=10)).kappa == 1.0


def test_a_class_with_few_cells_has_counts_and_no_share() -> None:
    few, enough = measure_agreement(answers(a_a=FEWEST_FOR_CLASS - 1, b_b=FEWEST_FOR_CLASS - 2, b_a=2)).by_class
    assert (few.class_name, few.cells, few.agreed, few.share) == ("a", 9, 9, None)
    assert (enough.cells, enough.agreed, enough.share) == (10, 8, 0.8)
    assert enough.interval is not None
    assert enough.interval[0] < 0.8 < enough.interval[1]


def test_cells_that_the_model_did_not_name_are_in_the_table_and_in_no_share() -> None:
    found = measure_agreement(answers(unidentified_a=3, a_a=2, a_artefact=1))
    assert found.table == {"a": {"a": 2, "artefact": 1}, "unidentified": {"a": 3}}
    assert (found.answers, found.named, found.agreed, found.declined) == (6, 3, 2, 3)


def test_no_answers_give_an_empty_agreement() -> None:
    found = measure_agreement([])
    assert (found.answers, found.kappa, found.by_class) == (0, None, ())
