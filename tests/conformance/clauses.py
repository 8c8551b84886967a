"""The clauses, read from the contract itself, and what became of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

CONTRACT = Path(__file__).resolve().parents[2] / "docs" / "contract.md"

NOT_BY_THE_KIT = "(not by the kit)"

DEVICE_HEARS = "9.4"
"""Of the clauses about receivers the one that binds a device."""

Result = Literal["pass", "FAIL", "not tested"]

MOST_FAULTS_SHOWN = 3

_CLAUSE = re.compile(r"^- \*\*(\d+\.\d+)\*\* (.*(?:\n  .*)*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Clause:
    """One numbered sentence of the contract."""

    number: str
    text: str

    @property
    def is_for_the_kit(self) -> bool:
        return NOT_BY_THE_KIT not in self.text

    @property
    def is_for_receivers(self) -> bool:
        return self.number.startswith("9.") and self.number != DEVICE_HEARS


def read_clauses(path: Path = CONTRACT) -> dict[str, Clause]:
    """All clauses by number, in their order."""
    found = _CLAUSE.findall(path.read_text(encoding="utf-8"))
    clauses = [Clause(number, " ".join(text.replace("*", "").split())) for number, text in found]
    return {clause.number: clause for clause in clauses}


@dataclass
class Findings:
    """What was found for each clause. `faults` by number; `seen`: how often it could be looked at; `why` it was not."""

    faults: dict[str, list[str]] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def look(self, number: str, is_met: bool, words: str) -> bool:
        """One look at a clause; words say what was wrong. Returns is_met."""
        self.seen[number] = self.seen.get(number, 0) + 1
        if not is_met:
            self.faults.setdefault(number, []).append(words)
        return is_met

    def leave(self, numbers: Iterable[str], why: str) -> None:
        """These clauses could not be looked at."""
        for number in numbers:
            self.why.setdefault(number, why)

    def result(self, number: str) -> Result:
        if self.faults.get(number):
            return "FAIL"
        return "pass" if self.seen.get(number) else "not tested"

    def lines(self, clauses: Iterable[Clause]) -> Iterator[str]:
        """A line for each clause, and below a failed one what was wrong."""
        for clause in clauses:
            result = self.result(clause.number)
            note = {
                "pass": f"{self.seen.get(clause.number, 0)} looks",
                "FAIL": f"{len(self.faults.get(clause.number, ()))} of {self.seen.get(clause.number, 0)} looks",
                "not tested": self.why.get(clause.number, "nothing of the kind was heard")
                if clause.is_for_the_kit
                else "needs the device's disk or power; the agent's own tests hold it",
            }[result]
            short = clause.text if len(clause.text) <= 78 else f"{clause.text[:75]}..."
            yield f"{result:<10}  {clause.number:<5} {short}  [{note}]"
            for words in self.faults.get(clause.number, [])[:MOST_FAULTS_SHOWN]:
                yield f"            {words}"
