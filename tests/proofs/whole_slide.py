"""A whole slide, ten thousand fields: does the map of it stay small and quick, and the count right?

    python -m tests.proofs.whole_slide [--fields 10000]

The simulated slide is scanned row by row, forth and back, each field overlapping with its neighbours by a fifth; no
stage tells a place. The true boxes, a pixel or two restless, go through registration and counting, so what is measured
is theirs. Told every thousand fields: the resident memory, the median time for counting a field once, and the count
against the truth. Exits with 1 when the map took more than MOST_MB, when it still grew by more than MOST_MB_PER_1000 a
thousand fields after it had begun to forget the oldest ones, or when the count is beyond the bounds of `count_once`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import psutil

from agent.analysis.placing import FIELDS_REMEMBERED
from agent.machine import give_back_free_memory, keep_big_blocks_apart
from tests.proofs.count_once import BOUNDS, PerfectScan, Score, kind_of
from tests.proofs.scanning import Window, World, crowded_slide, piece_of

SIZE_PX = (640, 480)
OVERLAP = 0.2
TOLD_EVERY = 1000
WARM_UP_FIELDS = 100
"""Until then the slide's own drawings, some 16 MB, and the libraries come into memory."""
MOST_MB = 80.0
"""15 kB for each of the FIELDS_REMEMBERED fields and a third as much again; see `agent.analysis.placing`."""
MOST_MB_PER_1000 = 1.0
"""Of a field that is forgotten nothing stays but cells that others show again; the rest is the allocator's unrest."""


@dataclass(slots=True)
class Figures:
    """What a scan has shown.

    memory_mb: (fields, MB more than after WARM_UP_FIELDS); seconds: for counting once, of each field.
    """

    score: Score = field(default_factory=Score)
    memory_mb: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def mb_per_1000(self) -> float | None:
        """Growth once the oldest fields are forgotten; None when the scan ended before."""
        late = [(fields, mb) for fields, mb in self.memory_mb if fields > FIELDS_REMEMBERED]
        if len(late) < 2:
            return None
        (first, low), (last, high) = late[0], late[-1]
        return (high - low) / (last - first) * 1000

    @property
    def faults(self) -> list[str]:
        found = []
        if self.memory_mb and (most := max(mb for _, mb in self.memory_mb)) > MOST_MB:
            found.append(f"the map took {most:.1f} MB, the bound is {MOST_MB:g}")
        if (growth := self.mb_per_1000) is not None and growth > MOST_MB_PER_1000:
            found.append(f"it grows by {growth:.2f} MB a thousand fields, the bound is {MOST_MB_PER_1000:g}")
        for kind, bound in BOUNDS.items():
            if abs(self.score.error(kind)) > bound:
                found.append(f"{kind} cells: {self.score.error(kind):+.2%}, the bound is {bound:.0%}")
        return found

    def __str__(self) -> str:
        score = self.score
        counts = ", ".join(
            f"{kind} {score.unique[kind]} of {score.truth[kind]} ({score.error(kind):+.2%})" for kind in BOUNDS
        )
        memory = f"the map takes {self.memory_mb[-1][1]:.1f} MB; " if self.memory_mb else ""
        return (
            f"{score.fields} fields, {score.unknown} at unknown places; {counts}; {memory}counting once"
            f" {median(self.seconds[-TOLD_EVERY:]) * 1000:.1f} ms a field"
        )


def run(fields: int, told_every: int = TOLD_EVERY, tell: Callable[[str], None] = print) -> Figures:
    """Scan so many fields."""
    scan = PerfectScan(SIZE_PX, np.random.default_rng(1))
    figures = Figures(scan.score, seconds=scan.seconds)
    before: set[int] = set()  # cells of the row before and of this one: no other row shows a cell again
    here: set[int] = set()
    memory, at_first_mb = psutil.Process(), 0.0
    for number, (world, corner, begins_row) in enumerate(walk(fields), start=1):
        if begins_row:
            before, here = here, set()
        for true in scan.visit(world, Window(0, 0)):
            scan.score.truth[kind_of(true.class_name)] += true.identifier not in before and true.identifier not in here
            here.add(true.identifier)
        if number == WARM_UP_FIELDS:
            at_first_mb = resident_mb(memory)
        elif number > WARM_UP_FIELDS and number % told_every == 0:
            figures.memory_mb.append((number, resident_mb(memory) - at_first_mb))
            tell(f"{corner}: {figures}")
    return figures


def walk(fields: int) -> Iterator[tuple[World, str, bool]]:
    """What each field shows, with its own corner at (0, 0), where on the slide that is, and whether a row begins."""
    slide = crowded_slide(7)
    step_px = [round(side * (1 - OVERLAP)) for side in SIZE_PX]
    columns = math.ceil(math.sqrt(fields))
    for index in range(fields):
        row, step = divmod(index, columns)
        column = columns - 1 - step if row % 2 else step
        piece = piece_of(slide, column * step_px[0], row * step_px[1], SIZE_PX)
        yield piece, f"column {column}, row {row}", step == 0


def resident_mb(process: psutil.Process) -> float:
    give_back_free_memory()
    return float(process.memory_info().rss / 2**20)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.whole_slide", description=__doc__.splitlines()[0])
    parser.add_argument("--fields", type=int, default=10_000)
    options = parser.parse_args(arguments)
    keep_big_blocks_apart()
    figures = run(options.fields)
    print(figures)
    print("\n".join(figures.faults) or "bounded, and right")
    return 1 if figures.faults else 0


if __name__ == "__main__":
    sys.exit(main())
