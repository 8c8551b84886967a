"""Reference intervals by age, and what a share says beside them once its own uncertainty is taken into account."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from agent.domain import AgeBand, ReferenceInterval

Flag = Literal["within", "low", "high", "perhaps-low", "perhaps-high"]
"""low, high: the whole interval of the share lies outside. perhaps-...: the share does, its interval does not."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A share beside its reference interval."""

    reference: ReferenceInterval
    flag: Flag


def find_reference(
    table: Iterable[ReferenceInterval], class_name: str, age_band: AgeBand | None
) -> ReferenceInterval | None:
    """The row for a class and an age band; None where there is none, or where the age is not known."""
    return next((row for row in table if row.class_name == class_name and row.age_band == age_band), None)


def judge(pct: float, low_pct: float, high_pct: float, reference: ReferenceInterval) -> Judgement:
    """Where a share lies. low_pct, high_pct: its own interval; all in %."""
    if pct > reference.high_pct:
        return Judgement(reference, "high" if low_pct > reference.high_pct else "perhaps-high")
    if pct < reference.low_pct:
        return Judgement(reference, "low" if high_pct < reference.low_pct else "perhaps-low")
    return Judgement(reference, "within")
