"""How exactly the cells of a slide are counted once: `python -m tests.proofs.count_once [--quick]`.

A large picture with known cells is scanned in many ways, without a stage that tells its place unless said. Two sources
of error are kept apart:

  perfect detections   the true boxes, a pixel or two restless, through registration and counting: the error is ours
  shipped detector     the same scans through the detector, against the same detector on a scan of the same picture
                       whose fields touch and do not overlap: the model's own errors mostly cancel, ours stay

Truth: the cells that some field shows without their right or lower edge cut off (the two-sides rule), each once.
Fails (exit 1) when the perfect detections are beyond the bounds over all scans.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from agent.analysis.duplicates import SlideMap
from agent.bench import Bench, make_bench
from agent.config import Config
from agent.domain import ClockReading, FrameQuality, SampleState
from agent.inference.models import open_models
from agent.pipeline import Stopwatch, analyse_frame
from tests.proofs.degrading import real_fields
from tests.proofs.scanning import (
    PLATELET,
    RED_CELL,
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


def scan_perfect(
    world: World, windows: Iterable[Window], size_px: tuple[int, int], seed: int, *, um_per_px: float | None = None
) -> Score:
    """True boxes through the map. um_per_px: given = the stage tells each place, off by its slack."""
    rng = np.random.default_rng(seed)
    slide, score = SlideMap("proof"), Score()
    true_once: dict[int, str] = {}
    number = 1
    for place, window in enumerate(windows, start=1):
        known: dict[str, object] = {}
        if um_per_px is not None:
            slack = rng.uniform(-15, 15, 2)
            known = {
                "um_per_px": um_per_px,
                "stage_um": ((window.x + slack[0]) * um_per_px, (window.y + slack[1]) * um_per_px),
            }
        frame = take(world, window, size_px, rng, place, **known)
        seen = truth_in(world, window, size_px)
        true_once |= {true.identifier: true.class_name for true, box in seen if may_count(box, size_px)}
        cells = perfect_cells(seen, number, rng, UNREST_PX)
        number += len(cells)
        observed = slide.observe(frame, cells)
        slide.add(observed.trace)
        score.fields += 1
        score.unknown += observed.place.source == "unknown"
        for true, box in seen:
            score.raw[kind_of(true.class_name)] += may_count(box, size_px)
        for name, count in observed.unique_counts.items():
            score.unique[kind_of(name)] += count
    score.truth.update(kind_of(name) for name in true_once.values())
    return score


def scan_detected(
    world: World,
    windows: Iterable[Window],
    size_px: tuple[int, int],
    seed: int,
    bench: Bench,
    *,
    has_stage: bool = False,
) -> Score:
    """The same through the shipped detector; classes are those of the detector."""
    rng = np.random.default_rng(seed)
    slide, score = SlideMap("proof"), Score()
    kinds: dict[str, str] = {}
    sample = SampleState("proof")
    quality = FrameQuality(is_accepted=True, reasons=(), focus=0.0, clipped_pct=0.0)
    for place, window in enumerate(windows, start=1):
        known = {"um_per_px": 1.0, "stage_um": (window.x, window.y)} if has_stage else {}
        frame = take(world, window, size_px, rng, place, **known)
        begun_s = time.perf_counter()
        analysed = analyse_frame(frame, quality, bench, sample, ClockReading(is_synchronised=True), Stopwatch())
        middle_s = time.perf_counter()
        observed = slide.observe(frame, analysed.cells)
        slide.add(observed.trace)
        score.share_of_analysis.append((time.perf_counter() - middle_s) / (middle_s - begun_s))
        sample = SampleState("proof", next_cell_number=sample.next_cell_number + len(analysed.cells))
        score.fields += 1
        score.unknown += observed.place.source == "unknown"
        for cell in observed.cells:
            kind = kind_of(cell.detection.class_name if cell.detection.class_name in (RED_CELL, PLATELET) else "")
            kinds[cell.cell_id] = kind
            score.raw[kind] += 1
            score.unique[kind] += bool(cell.is_counted)
            for old in cell.supersedes:
                score.unique[kinds[old]] -= 1
    return score


def scans(world: World, size_px: tuple[int, int], rng: np.random.Generator) -> dict[str, list[Window]]:
    """The ways in which a slide is scanned."""
    drift_px = 0.004 * size_px[0]
    jitter_px = 0.02 * size_px[0]
    ways = {f"overlap {round(100 * share)} %": meander(world, size_px, share) for share in (0.0, 0.1, 0.2, 0.3, 0.4)}
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
            reference = scan_detected(world, meander(world, size_px, 0.0), size_px, 3, bench, has_stage=True)
            for share in (0.0, 0.2, 0.4):
                score = scan_detected(world, meander(world, size_px, share), size_px, 3, bench)
                score.truth = reference.unique
                shares += score.share_of_analysis
                report(f"{world_name}, detector, overlap {share:.0%}", score)
    nucleated, red = (total.unique[kind] / max(1, total.truth[kind]) for kind in ("nucleated", "red"))
    print("perfect detections, sum of absolute errors over all scans:", end=" ")
    print(f"nucleated {nucleated:.2%} (bound {NUCLEATED_BOUND:.0%}), red cells {red:.2%} (bound {RED_BOUND:.0%})")
    if shares:
        print(f"time of counting once: {median(shares):.1%} of the analysis of the same frame (median)")
    return 0 if nucleated <= NUCLEATED_BOUND and red <= RED_BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
