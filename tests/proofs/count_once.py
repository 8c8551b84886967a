"""How exactly the cells of a slide are counted once: `python -m tests.proofs.count_once [--quick]`.

A large picture with known cells is scanned in many ways, without a stage that tells its place unless said. Two sources
of error are kept apart:

  perfect detections   the true boxes, a pixel or two restless, through registration and counting: the error is ours
  shipped detector     the same scans through the detector, against what the same detector says of the picture when it
                       sees each place once, well inside a field: the model's own errors mostly cancel, ours stay

Real fields stand side by side in such a picture, and where two meet cells are halves; the detector says now this, now
that of them, which is an error of the picture and of nobody else. The simulated slide has no such seams.

Truth: the cells that some field shows without their right or lower edge cut off (the two-sides rule), each once.
Fails (exit 1) when the perfect detections are beyond the bounds over all scans.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import NDArray

from agent.analysis.duplicates import SlideMap
from agent.analysis.registration import Shift
from agent.bench import Bench, make_bench
from agent.config import Config
from agent.domain import Cell, ClockReading, Frame, FrameQuality, SampleState
from agent.inference.models import open_models
from agent.pipeline import Stopwatch, analyse_frame
from tests.proofs.degrading import real_fields
from tests.proofs.scanning import (
    PLATELET,
    RED_CELL,
    TrueCell,
    Window,
    World,
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

NUCLEATED_BOUND, RED_BOUND = 0.01, 0.03
UNREST_PX = 1.5
OVERLAPS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
CORE = (0.45, 0.95)
"""Share of a field's sides: where the lower right corner of a cell lies that is wholly inside, if it is no giant."""


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
        self._slide = SlideMap("proof")
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
        observed = self._slide.observe(frame, cells)
        self._slide.add(observed.trace)
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


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the shipped detector says of a world, each place seen once and well inside a field.

    corners: lower right ones of its boxes, (n, 2); kinds: of each. region: left, top, right, bottom of what was seen.
    """

    corners: NDArray[np.float64]
    kinds: tuple[str, ...]
    region: tuple[float, float, float, float]

    def has(self, x: float, y: float) -> bool:
        return self.region[0] <= x < self.region[2] and self.region[1] <= y < self.region[3]

    def shown_by(self, windows: Iterable[Window], size_px: tuple[int, int]) -> Counter[str]:
        """How many of each kind some window shows without a cut at the right or the lower edge."""
        is_shown = np.zeros(len(self.corners), bool)
        for window in windows:
            here = Shift(window.x, window.y, window.turn).inverse().apply_all(self.corners)
            is_shown |= ((here > 1) & (here < np.asarray(size_px) - 1)).all(axis=1)
        return Counter(kind for kind, shown in zip(self.kinds, is_shown, strict=True) if shown)


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


def look_once(world: World, size_px: tuple[int, int], bench: Bench) -> Seen:
    """Fields half a field apart; of each the boxes count whose lower right corner lies in the right, lower middle."""
    rng, looking = np.random.default_rng(4), Looking(bench)
    size = np.asarray(size_px, float)
    low, high = CORE[0] * size, CORE[1] * size
    last = np.floor((np.asarray(world.pixels_bgr.shape[1::-1]) - size) / (size / 2)).astype(int)
    corners, kinds = [], []
    for number, (column, row) in enumerate(np.ndindex(*(last + 1)), start=1):
        window = Window(column * size[0] / 2, row * size[1] / 2)
        to_world = Shift(window.x, window.y)
        for cell in looking.find(take(world, window, size_px, rng, number)):
            corner = np.asarray((cell.detection.box.x_max, cell.detection.box.y_max))
            if ((corner >= low) & (corner < high)).all():
                corners.append(to_world.apply(*corner))
                kinds.append(detected_kind(cell))
    right, bottom = high + last * size / 2
    return Seen(np.asarray(corners), tuple(kinds), (low[0], low[1], right, bottom))


def detected_kind(cell: Cell) -> str:
    """By the class of the detector."""
    return kind_of(cell.detection.class_name if cell.detection.class_name in (RED_CELL, PLATELET) else "")


def scan_detected(
    world: World, windows: Sequence[Window], size_px: tuple[int, int], seed: int, bench: Bench, seen: Seen
) -> Score:
    """The same through the shipped detector; counted is what lies where `seen` knows what there is."""
    rng, looking = np.random.default_rng(seed), Looking(bench)
    slide, score = SlideMap("proof"), Score()
    kinds: dict[str, str] = {}
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
            is_known = seen.has(*to_world.apply(cell.detection.box.x_max, cell.detection.box.y_max))
            kind = kinds[cell.cell_id] = detected_kind(cell) if is_known else "elsewhere"
            score.raw[kind] += 1
            score.unique[kind] += bool(cell.is_counted)
            for old in cell.supersedes:
                score.unique[kinds[old]] -= 1
    score.truth = seen.shown_by(windows, size_px)
    return score


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
    ways["all at once"] = list(
        with_revisits(refocused(shaken(base, rng, jitter_px, drift_px / 10), rng, 2.0), rng, 0.15)
    )
    return ways


def report(name: str, score: Score) -> None:
    by_kind = "   ".join(
        f"{score.truth[kind]:>6} {score.raw[kind]:>6} {score.unique[kind]:>6} {score.error(kind):>+7.2%}"
        for kind in ("nucleated", "red")
    )
    print(f"{name:<44} {score.fields:>5} {score.unknown:>4}   {by_kind}", flush=True)


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
    print(f"{'':<44} field  unk   nucleated: true, seen, counted, error   red: true, seen, counted, error")
    total = Score()
    shares: list[float] = []
    for world_name, (world, size_px) in worlds(is_quick=arguments.quick).items():
        if arguments.only not in (None, world_name):
            continue
        rng = np.random.default_rng(5)
        for way, windows in scans(world, size_px, rng).items():
            score = scan_perfect(world, windows, size_px, seed=3)
            report(f"{world_name}, {way}", score)
            for kind in ("nucleated", "red"):
                total.truth[kind] += score.truth[kind]
                total.unique[kind] += abs(score.unique[kind] - score.truth[kind])
        score = scan_perfect(world, meander(world, size_px, 0.2), size_px, seed=3, um_per_px=0.08)
        report(f"{world_name}, overlap 20 %, stage tells", score)
        if arguments.detector:
            config = Config()
            bench = make_bench(config, open_models(config.models))
            seen = look_once(world, size_px, bench)
            for way, windows in scans(world, size_px, np.random.default_rng(5)).items():
                score = scan_detected(world, windows, size_px, 3, bench, seen)
                shares += score.share_of_analysis
                report(f"{world_name}, detector, {way}", score)
    nucleated, red = (total.unique[kind] / max(1, total.truth[kind]) for kind in ("nucleated", "red"))
    print("perfect detections, sum of absolute errors over all scans:", end=" ")
    print(f"nucleated {nucleated:.2%} (bound {NUCLEATED_BOUND:.0%}), red cells {red:.2%} (bound {RED_BOUND:.0%})")
    if shares:
        print(f"time of counting once: {median(shares):.1%} of the analysis of the same frame (median)")
    return 0 if nucleated <= NUCLEATED_BOUND and red <= RED_BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
