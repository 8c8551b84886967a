"""How often a person and the model name a cell alike, and how much of that chance would give too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.analysis.cells import UNIDENTIFIED
from agent.analysis.intervals import Interval, binomial_interval

FEWEST_FOR_KAPPA = 30
"""Named cells below which no kappa is told: with 80 % agreement of which 30 % are chance its standard error is then
above 0.1, which is the difference between two words of every scale of kappas."""

FEWEST_FOR_CLASS = 10
"""Cells of a class below which its agreement is told as counts only: the 95 % interval of a share near a half is then
wider than 60 % points."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a person said of one cell. model, person: a class, `unidentified` or `artefact`. by: an opaque token.

    at: RFC 3339.
    """

    cell_id: str
    model: str
    person: str
    by: str | None = None
    at: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ClassAgreement:
    """Of the cells that the model named so, how many the person named so too. share: 0 to 1; None = too few cells."""

    class_name: str
    cells: int
    agreed: int
    share: float | None
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """table: by the model's name, then by the person's. answers: all of them; named: where the model gave a name.

    kappa: Cohen's, of the named ones; None = too few, or only one class, where it says nothing.
    declined: the model gave no name (`unidentified`); they are in the table, and in no share.
    """

    table: Mapping[str, Mapping[str, int]]
    answers: int
    named: int
    agreed: int
    declined: int
    kappa: float | None
    kappa_error: float | None
    by_class: tuple[ClassAgreement, ...]


def measure_agreement(answers: Iterable[Answer]) -> Agreement:
    """Compare persons' answers with the model's names. One answer for each cell: the newest.

    The cells of a review list are those that the model was unsure of: what is measured on them is no accuracy of all.
    """
    pairs = Counter((answer.model, answer.person) for answer in answers)
    models = sorted({model for model, _ in pairs}, key=_order)
    persons = sorted({person for _, person in pairs}, key=_order)
    table = {model: {person: pairs[model, person] for person in persons if pairs[model, person]} for model in models}
    named = {pair: count for pair, count in pairs.items() if pair[0] != UNIDENTIFIED}
    total = sum(named.values())
    kappa = cohens_kappa(named) if total >= FEWEST_FOR_KAPPA else None
    return Agreement(
        table=table,
        answers=sum(pairs.values()),
        named=total,
        agreed=sum(count for (model, person), count in named.items() if model == person),
        declined=sum(pairs.values()) - total,
        kappa=None if kappa is None else kappa[0],
        kappa_error=None if kappa is None else kappa[1],
        by_class=tuple(_of_class(model, table[model]) for model in models if model != UNIDENTIFIED),
    )


def cohens_kappa(pairs: Mapping[tuple[str, str], int]) -> tuple[float, float] | None:
    """Agreement beyond chance, -1 to 1, and its standard error; None where chance alone would give all of it.

    kappa = (po - pe) / (1 - pe), po the share of equal pairs, pe the sum over classes of the product of both sides'
    shares. Source: Cohen, Educational and Psychological Measurement 20 (1960) 37-46, equations 1 and 7.
    """
    total = sum(pairs.values())
    if total == 0:
        return None
    first: Counter[str] = Counter()
    second: Counter[str] = Counter()
    for (one, other), count in pairs.items():
        first[one] += count
        second[other] += count
    observed = sum(count for (one, other), count in pairs.items() if one == other) / total
    expected = sum(first[name] * second[name] for name in first) / total**2
    if expected >= 1:
        return None
    error = (observed * (1 - observed) / (total * (1 - expected) ** 2)) ** 0.5
    return (observed - expected) / (1 - expected), error


def _of_class(name: str, row: Mapping[str, int]) -> ClassAgreement:
    cells, agreed = sum(row.values()), row.get(name, 0)
    is_enough = cells >= FEWEST_FOR_CLASS
    interval = binomial_interval(agreed, cells) if is_enough else None
    return ClassAgreement(name, cells, agreed, agreed / cells if is_enough else None, interval)


def _order(name: str) -> tuple[bool, str]:
    return name == UNIDENTIFIED, name
