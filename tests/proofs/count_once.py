"""How exactly the cells of a slide are counted once: `python -m tests.proofs.count_once [--quick]`.

A large picture with known cells is scanned in many ways, without a stage that tells its place unless said. Two sources
of error are kept apart:

  perfect detections   the true boxes, a pixel or two restless, through registration and counting: the error is ours
  shipped detector     the same scans through the detector: of the true cells that it names rightly in a view that may
                       count, how many are counted. A true cell that is counted as another kind, or twice, is too many

Truth: the cells that some field shows without their right or lower edge cut off (the two-sides rule), each once. Real
fields stand side by side in such a picture, and where two meet, at the seams, cells are halves; the detector says now
this, now that of them, which is an error of the picture and of nobody else: there it is not asked.
Fails (exit 1) when the errors of all scans together are beyond the bounds.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from statistics import median

import numpy as np

from agent.analysis.duplicates import SlideMap
from agent.analysis.registration import Shift
from agent.bench import Bench, make_bench
from agent.config import Config
from agent.domain import Box, Cell, ClockReading, Frame, FrameQuality, SampleState
from agent.inference.models import open_models
from agent.pipeline import Stopwatch, analyse_frame
from tests.proofs.degrading import real_fields
from tests.proofs.scanning import (
    PLATELET,
    RED_CELL,
    TrueCell,
    Window,
    World,
    after_a_jump,
    may_count,
    meander,
    perfect_cells,
    refocused,
    shaken,
    simulated_world,
    take,
    truth_in,
    turned,
    with_revisits,
    world_of_fields,
)

BOUNDS = {"nucleated": 0.01, "red": 0.03}
"""By kind of cell: the counting error, as a share."""

UNREST_PX = 1.5
OVERLAPS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
ON_CELL = 0.5
"""Share of a found box that lies in the box of the true cell that it shows."""


@dataclass(slots=True)
class Score:
    """What one scan gave, by kind of cell: nucleated, red, platelet."""

    fields: int = 0
    unknown: int = 0
    raw: Counter[str] = field(default_factory=Counter)
    unique: Counter[str] = field(default_factory=Counter)
    truth: Counter[str] = field(default_factory=Counter)
    share_of_analysis: list[float] = field(default_factory=list)

    def error(self, kind: str) -> float:
        return (self.unique[kind] - self.truth[kind]) / max(1, self.truth[kind])


def kind_of(class_name: str) -> str:
    return {RED_CELL: "red", PLATELET: "platelet"}.get(class_name, "nucleated")


class PerfectScan:
    """True boxes through the map, field after field. score: what came of it; seconds: for counting once, of each."""

    def __init__(self, size_px: tuple[int, int], rng: np.random.Generator) -> None:
        self.score = Score()
        self.seconds: list[float] = []
        self._size_px = size_px
        self._rng = rng
        self.slide = SlideMap("proof")
        self._next_cell = 1

    def visit(self, world: World, window: Window, **known: object) -> list[TrueCell]:
        """Look at a field; gives the cells that may count there. known: what the camera tells of its place."""
        score = self.score
        score.fields += 1
        frame = take(world, window, self._size_px, self._rng, score.fields, **known)
        seen = truth_in(world, window, self._size_px)
        cells = perfect_cells(seen, self._next_cell, self._rng, UNREST_PX)
        self._next_cell += len(cells)
        begun_s = time.perf_counter()
        observed = self.slide.observe(frame, cells)
        self.slide.add(observed.trace)
        self.seconds.append(time.perf_counter() - begun_s)
        score.unknown += observed.place.source == "unknown"
        for name, count in observed.unique_counts.items():
            score.unique[kind_of(name)] += count
        countable = [true for true, box in seen if may_count(box, self._size_px)]
        score.raw.update(kind_of(true.class_name) for true in countable)
        return countable


def scan_perfect(
    world: World, windows: Iterable[Window], size_px: tuple[int, int], seed: int, *, um_per_px: float | None = None
) -> Score:
    """True boxes through the map. um_per_px: given = the stage tells each place, off by its slack."""
    rng = np.random.default_rng(seed)
    scan = PerfectScan(size_px, rng)
    true_once: dict[int, str] = {}
    for window in windows:
        known: dict[str, object] = {}
        if um_per_px is not None:
            slack = rng.uniform(-15, 15, 2)
            known = {
                "um_per_px": um_per_px,
                "stage_um": ((window.x + slack[0]) * um_per_px, (window.y + slack[1]) * um_per_px),
            }
        true_once |= {true.identifier: true.class_name for true in scan.visit(world, window, **known)}
    scan.score.truth.update(kind_of(name) for name in true_once.values())
    return scan.score


class Looking:
    """The shipped models on one frame after another, as the pipeline asks them."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._sample = SampleState("proof")
        self._quality = FrameQuality(is_accepted=True, reasons=(), focus=0.0, clipped_pct=0.0)

    def find(self, frame: Frame) -> tuple[Cell, ...]:
        clock, watch = ClockReading(is_synchronised=True), Stopwatch()
        found = analyse_frame(frame, self._quality, self._bench, self._sample, clock, watch)
        self._sample = SampleState("proof", next_cell_number=self._sample.next_cell_number + len(found.cells))
        return found.cells


class Labels:
    """The true cells of a world, but for those at its seams, which are in nobody's count."""

    def __init__(self, world: World) -> None:
        self._cells = world.cells
        self._boxes = np.asarray([astuple(cell.box) for cell in world.cells])
        self._is_at_seam = [world.is_at_seam(cell.box) for cell in world.cells]

    def at(self, box: Box) -> TrueCell | None:
        """The true cell that a box in the picture shows."""
        low = np.maximum(self._boxes[:, :2], (box.x_min, box.y_min))
        high = np.minimum(self._boxes[:, 2:], (box.x_max, box.y_max))
        shared = np.clip(high - low, 0, None).prod(1)
        area = box.width_px * box.height_px
        unions = (self._boxes[:, 2:] - self._boxes[:, :2]).prod(1) + area - shared
        best = int((shared / unions).argmax())
        is_one = shared[best] >= ON_CELL * area and not self._is_at_seam[best]
        return self._cells[best] if is_one else None


def scan_detected(
    world: World, windows: Sequence[Window], size_px: tuple[int, int], seed: int, bench: Bench, labels: Labels
) -> Score:
    """The same through the shipped detector."""
    rng, looking = np.random.default_rng(seed), Looking(bench)
    slide, score = SlideMap("proof"), Score()
    kinds: dict[str, str] = {}
    found: dict[int, str] = {}
    for place, window in enumerate(windows, start=1):
        frame = take(world, window, size_px, rng, place)
        begun_s = time.perf_counter()
        cells = looking.find(frame)
        middle_s = time.perf_counter()
        observed = slide.observe(frame, cells)
        slide.add(observed.trace)
        score.share_of_analysis.append((time.perf_counter() - middle_s) / (middle_s - begun_s))
        score.fields += 1
        score.unknown += observed.place.source == "unknown"
        to_world = Shift(window.x, window.y, window.turn)
        for cell in observed.cells:
            true = labels.at(seen_from(to_world, cell))
            kind = kinds[cell.cell_id] = detected_kind(cell) if true is not None else "elsewhere"
            if true is not None and may_count(cell.detection.box, size_px):
                score.raw[kind] += 1
                if kind == kind_of(true.class_name):
                    found[true.identifier] = kind
            score.unique[kind] += bool(cell.is_counted)
            for old in cell.supersedes:
                score.unique[kinds[old]] -= 1
    score.truth.update(found.values())
    return score


def seen_from(to_world: Shift, cell: Cell) -> Box:
    """The cell's box in the picture; its turn is small, and the corners alone are moved."""
    box = cell.detection.box
    return Box(*to_world.apply(box.x_min, box.y_min), *to_world.apply(box.x_max, box.y_max))


def detected_kind(cell: Cell) -> str:
    """By the class of the detector."""
    return kind_of(cell.detection.class_name if cell.detection.class_name in (RED_CELL, PLATELET) else "")


def scans(world: World, size_px: tuple[int, int], rng: np.random.Generator) -> dict[str, list[Window]]:
    """The ways in which a slide is scanned."""
    drift_px = 0.004 * size_px[0]
    jitter_px = 0.02 * size_px[0]
    ways = {f"overlap {round(100 * share)} %": meander(world, size_px, share) for share in OVERLAPS}
    base = meander(world, size_px, 0.3)
    ways["30 %, jitter, drift"] = shaken(base, rng, jitter_px, drift_px / 10)
    ways["30 %, focus changes"] = refocused(base, rng, 0.03 * 90)
    ways["two passes, second turned 2 degrees"] = [*base, *turned(base, size_px, 2.0)[::-1]]
    ways["20 %, revisits"] = list(with_revisits(meander(world, size_px, 0.2), rng, 0.2))
    ways["30 %, a jump to the end, and back"] = after_a_jump(base)
    ways["all at once"] = list(
        with_revisits(refocused(shaken(base, rng, jitter_px, drift_px / 10), rng, 2.0), rng, 0.15)
    )
    return ways


class Total:
    """What all scans have given. Errors of different signs do not cancel."""

    def __init__(self) -> None:
        self._cells: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    def add(self, name: str, score: Score) -> None:
        """Take in a scan, and print its line."""
        for kind in BOUNDS:
            self._cells[kind] += score.truth[kind]
            self._errors[kind] += abs(score.unique[kind] - score.truth[kind])
        by_kind = "   ".join(
            f"{score.truth[kind]:>6} {score.raw[kind]:>6} {score.unique[kind]:>6} {score.error(kind):>+7.2%}"
            for kind in BOUNDS
        )
        print(f"{name:<58} {score.fields:>5} {score.unknown:>4}   {by_kind}", flush=True)

    def error(self, kind: str) -> float:
        return self._errors[kind] / max(1, self._cells[kind])

    @property
    def is_within(self) -> bool:
        return all(self.error(kind) <= bound for kind, bound in BOUNDS.items())

    def __str__(self) -> str:
        said = (f"{kind} {self.error(kind):.2%} (bound {bound:.0%})" for kind, bound in BOUNDS.items())
        return f"sum of absolute errors over all scans: {', '.join(said)}"


def worlds(*, is_quick: bool) -> dict[str, tuple[World, tuple[int, int]]]:
    made: dict[str, tuple[World, tuple[int, int]]] = {}
    side = (2600, 2000) if is_quick else (4600, 3400)
    made["simulated"] = (simulated_world(21, *side), (640, 480))
    for device, columns in (("bccd", 6), ("raabin", 6), ("pbc", 8)):
        fields = [one for one in real_fields("test", device) if one.cells]
        if fields:
            made[device] = (
                world_of_fields(fields[: columns * (3 if is_quick else 6)], columns),
                fields[0].pixels_bgr.shape[1::-1],
            )
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller pictures")
    parser.add_argument("--detector", action="store_true", help="the shipped detector too")
    parser.add_argument("--only", help="one world")
    arguments = parser.parse_args()
    print(f"{'':<58} field  unk   nucleated: true, seen, counted, error   red: true, seen, counted, error")
    totals = {"perfect detections": Total()}
    shares: list[float] = []
    config = Config()
    bench = make_bench(config, open_models(config.models)) if arguments.detector else None
    for world_name, (world, size_px) in worlds(is_quick=arguments.quick).items():
        if arguments.only not in (None, world_name):
            continue
        ways = scans(world, size_px, np.random.default_rng(5))
        for way, windows in ways.items():
            totals["perfect detections"].add(f"{world_name}, {way}", scan_perfect(world, windows, size_px, seed=3))
        score = scan_perfect(world, meander(world, size_px, 0.2), size_px, seed=3, um_per_px=0.08)
        totals["perfect detections"].add(f"{world_name}, overlap 20 %, stage tells", score)
        if bench is not None:
            total = totals.setdefault("shipped detector", Total())
            labels = Labels(world)
            for way, windows in ways.items():
                score = scan_detected(world, windows, size_px, 3, bench, labels)
                shares += score.share_of_analysis
                total.add(f"{world_name}, detector, {way}", score)
    for name, total in totals.items():
        print(f"{name}, {total}")
    if shares:
        print(f"time of counting once: {median(shares):.1%} of the analysis of the same frame (median)")
    return 0 if all(total.is_within for total in totals.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
