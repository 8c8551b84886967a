"""How often the drift monitor cries without a cause, and how soon with one: `python -m tests.proofs.drift`.

First numbers alone: a laboratory whose slides differ as slides do, in focus, colours and patients, undisturbed and then
with one thing changed; and fleets of devices. Then the whole way: simulated slides through gate, detector and
classifier as they ship. Fails (exit 1) when undisturbed fields or fleets raise more alarms than the bound, or a
disturbance is not told.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from statistics import median

import cv2
import numpy as np
from numpy.random import Generator

from agent.analysis.drift import (
    FIGURES,
    DriftMemory,
    DriftPlan,
    charted,
    drift_plan,
    follow_end,
    follow_field,
    read_drift,
    share_figure,
    share_name,
    shown,
)
from agent.analysis.fleet import NOT_COMPARED, FleetDevice, WatchedFigure, compare_fleet
from agent.bench import Bench, make_bench
from agent.camera.hashing import hash_pixels
from agent.camera.simulated import DEFAULT_SHARES, CellDensity, SimulatedSlide
from agent.camera.smear import SmearStyle
from agent.config import Config
from agent.domain import (
    Box,
    Cell,
    CellStatus,
    ClockReading,
    Detection,
    FieldResult,
    Frame,
    FrameColour,
    FrameQuality,
    ModelIdentity,
    Pixels,
    Provenance,
    SampleState,
)
from agent.inference.models import open_models
from agent.pipeline import Outcome, process_frame, with_drift

BEGIN = datetime(2026, 11, 27, tzinfo=timezone.utc)
PROVENANCE = Provenance(
    "0", ModelIdentity("d", "1", "0" * 64), ModelIdentity("c", "1", "1" * 64), "r", "none", "2" * 64
)
CLASSES = tuple(DEFAULT_SHARES)
ALARMS_AT_MOST = 1
"""In each laboratory, of the fields that are asked for with --fields."""
CRYING_FLEETS_AT_MOST = 0.02
"""Share of fleets in which an undisturbed device stands out, where devices differ by one least shift or less."""


# ------------------------------------------------------------------------------------------------------- numbers alone


@dataclass(frozen=True, slots=True)
class Laboratory:
    """What its fields say. Spreads are standard deviations of natural logarithms: (between slides, between fields).

    They are the middle of what the three devices of the public data show between pictures, focus 0.43 to 0.54, ground
    0.01 to 0.06, stain 0.05 to 0.15, half of the variance given to the slide. patients: concentration of the Dirichlet
    distribution of the class mix: 20 makes neutrophils differ by 11 % points.
    """

    focus: float = 60.0
    ground_bgr: tuple[float, float, float] = (202.0, 228.0, 254.0)
    stain_od_bgr: tuple[float, float, float] = (0.11, 0.17, 0.12)
    focus_spread: tuple[float, float] = (0.33, 0.33)
    ground_spread: tuple[float, float] = (0.02, 0.02)
    stain_spread: tuple[float, float] = (0.09, 0.09)
    shares: Mapping[str, float] = field(default_factory=lambda: DEFAULT_SHARES)
    patients: float = 20.0
    nucleated: float = 1.4
    unidentified: float = 0.03
    probability: float = 0.95
    defocus: float = 0.0
    swapped: float = 0.0
    """defocus: loss of focus with each field, as a share. swapped: of the first class, as a share, gets the last's
    name."""


def slide_fields(laboratory: Laboratory, rng: Generator, cells_wanted: int, before: int) -> Iterator[FieldResult]:
    """The fields of one slide, until it has so many nucleated cells. before: fields since the disturbance began."""
    lab = laboratory
    names = list(lab.shares)
    mix = rng.dirichlet(np.asarray([lab.shares[name] for name in names]) * lab.patients)
    focus, *stain = (
        lab.focus * np.exp(rng.normal(0, lab.focus_spread[0])),
        *_shaken(lab.stain_od_bgr, lab.stain_spread[0], rng),
    )
    ground = _shaken(lab.ground_bgr, lab.ground_spread[0], rng)
    unidentified = rng.beta(20 * lab.unidentified, 20 * (1 - lab.unidentified))
    sureness = rng.normal(lab.probability, 0.01)
    number = found = 0
    while found < cells_wanted:
        number += 1
        cells = []
        for _ in range(rng.poisson(lab.nucleated)):
            name = names[int(rng.choice(len(names), p=mix))]
            if name == names[0] and rng.random() < lab.swapped:
                name = names[-1]
            status = CellStatus.UNIDENTIFIED if rng.random() < unidentified else CellStatus.ACCEPTED
            cells.append(_cell(name, float(np.clip(rng.normal(sureness, 0.08), 0.75, 1)), status))
        found += len(cells)
        seen = focus * np.exp(rng.normal(0, lab.focus_spread[1])) * (1 - lab.defocus) ** (before + number)
        colour = FrameColour(
            _shaken(ground, lab.ground_spread[1], rng),
            _shaken((stain[0], stain[1], stain[2]), lab.stain_spread[1], rng),
        )
        yield _field(FrameQuality(True, (), float(seen), 0.0, colour), tuple(cells))


def _shaken(bgr: tuple[float, float, float], spread: float, rng: Generator) -> tuple[float, float, float]:
    """Each channel over green moves on its own, all of them together too."""
    blue, green, red = (float(value) for value in np.asarray(bgr) * np.exp(rng.normal(0, spread / 2**0.5, 3)))
    return blue, green, red


def _cell(name: str, probability: float, status: CellStatus) -> Cell:
    return Cell("p-1", Detection(Box(0, 0, 1, 1), "WBC", 0.9), name, probability, None, status)


def _field(quality: FrameQuality, cells: tuple[Cell, ...]) -> FieldResult:
    pixels = np.zeros((1, 1, 3), np.uint8)
    frame = Frame(1, pixels, BEGIN, 0, "0" * 64, "proof")
    return FieldResult(frame, quality, cells, {}, {}, 0, {}, PROVENANCE, ClockReading(True))


class Watched:
    """A laboratory's monitor. fields: seen since the last `reset`; alarms: by figure, how often one was raised."""

    def __init__(self, plan: DriftPlan, memory: DriftMemory | None = None) -> None:
        self.plan = plan
        self.memory = memory or DriftMemory()
        self.fields = self.slides = self.number = 0
        self.alarms: dict[str, int] = {}

    def see_slide(self, laboratory: Laboratory, rng: Generator, cells: int) -> set[str]:
        """What is raised anew at the end of one more slide."""
        self.number += 1
        sample = SampleState(f"s-{self.number}")
        before = self.moved
        for one in slide_fields(laboratory, rng, cells, self.fields):
            self.memory = follow_field(self.memory, self.plan, one, sample)
            self.fields += 1
        self.memory = follow_end(self.memory, self.plan, replace(sample, phase="finished"))
        self.slides += 1
        fresh = self.moved - before
        for name in fresh:
            self.alarms[name] = self.alarms.get(name, 0) + 1
        return fresh

    @property
    def moved(self) -> set[str]:
        return {name for name, figure in read_drift(self.memory, self.plan).figures.items() if figure.moved}


DISTURBANCES: Mapping[str, tuple[str, Callable[[Laboratory], Laboratory]]] = {
    "a lamp 15 % warmer (red over green)": (
        "ground-red",
        lambda lab: replace(lab, ground_bgr=(lab.ground_bgr[0], lab.ground_bgr[1], lab.ground_bgr[2] * 1.15)),
    ),
    "a stain 1.5 times as strong": (
        "stain-density",
        lambda lab: replace(lab, stain_od_bgr=tuple(1.5 * density for density in lab.stain_od_bgr)),
    ),
    "focus that loses 0.2 % with each field": ("focus", lambda lab: replace(lab, defocus=0.002)),
    "1 in 4 neutrophils gets another name": (f"share-{CLASSES[-1]}", lambda lab: replace(lab, swapped=0.25)),
    "unidentified 15 % instead of 3 %": ("unidentified", lambda lab: replace(lab, unidentified=0.15)),
    "names less sure by 6 % points": ("confidence", lambda lab: replace(lab, probability=lab.probability - 0.06)),
}


def prove_numbers(fields: int, laboratories: int, repeats: int, cells: int) -> list[str]:
    plan = drift_plan(Config(), PROVENANCE, CLASSES)
    assert plan is not None
    usual, faults = Laboratory(), []
    learnt: list[DriftMemory] = []
    for number in range(laboratories):
        rng = np.random.default_rng(number)
        place = Watched(plan)
        for _ in range(plan.how.learn):
            place.see_slide(usual, rng, cells)
        learnt.append(place.memory)
        place = Watched(plan, place.memory)
        while place.fields < fields:
            place.see_slide(usual, rng, cells)
        raised = sum(place.alarms.values())
        words = f" ({', '.join(f'{count} {name}' for name, count in place.alarms.items())})" if raised else ""
        print(
            f"laboratory {number + 1}: {place.fields} undisturbed fields, {place.slides} slides: {raised} alarms{words}"
        )
        if raised > ALARMS_AT_MOST:
            faults.append(f"laboratory {number + 1}: {raised} alarms without a cause")
    print(f"{len(plan.figures())} charts; baseline of {plan.how.learn} slides with {cells} nucleated cells each")
    for words, (figure, change) in DISTURBANCES.items():
        took = []
        for number in range(repeats):
            place = Watched(plan, learnt[number % laboratories])
            rng = np.random.default_rng(1000 + number)
            while figure not in place.moved and place.slides < 60:
                place.see_slide(change(usual), rng, cells)
            took.append((place.slides, place.fields) if figure in place.moved else (99, 99999))
        slides, seen = median(one[0] for one in took), median(one[1] for one in took)
        worst = max(took)
        print(
            f"{words}: {figure} told after {slides:g} slides, {seen:g} fields (median of {repeats}; at most {worst[0]})"
        )
        if worst[0] > 60:
            faults.append(f"{words}: not told")
    return faults


# ------------------------------------------------------------------------------------------------------- the fleet


def fleet_of(count: int, spread: float, rng: Generator, off: float = 0.0) -> list[FleetDevice]:
    """Devices that differ by so many least shifts of each figure (standard deviation); the first is off in one."""
    figures = {name: figure for name, figure in FIGURES.items() if name not in NOT_COMPARED}
    figures |= {share_name(name): share_figure(name) for name in CLASSES}
    devices = []
    for number in range(count):
        watched = {}
        for name, figure in figures.items():
            usual = charted(figure, {"log": 1.0, "share": 15.0, "plain": 92.0}[figure.scale])
            shift = spread * rng.normal() + (off if number == 0 and name == "stain-density" else 0.0)
            value = usual + figure.least * shift
            ends = (value, value - figure.least, value + figure.least)
            watched[name] = WatchedFigure(*(shown(figure, end) for end in ends))
        devices.append(FleetDevice(("lab", f"scope-{number}"), "m", watched))
    return devices


def prove_fleet(fleets: int) -> list[str]:
    faults = []
    for count in (4, 6, 10, 20):
        for spread in (0.5, 1.0, 2.0):
            rng = np.random.default_rng(count)
            cried = told = 0
            for _ in range(fleets):
                standing = compare_fleet(fleet_of(count, spread, rng))
                cried += any(one.stands_out for listed in standing.values() for one in listed)
                first = compare_fleet(fleet_of(count, spread, rng, off=15.0))["lab", "scope-0"]
                told += any(one.stands_out and one.name == "stain-density" for one in first)
            words = f"{count} devices that differ by {spread:g} least shifts"
            print(f"{words}: one cries in {cried / fleets:.1%} of the fleets; off by 15 is told in {told / fleets:.0%}")
            if spread <= 1 and cried / fleets > CRYING_FLEETS_AT_MOST:
                faults.append(f"{words}: {cried / fleets:.1%} cry without a cause")
    return faults


# --------------------------------------------------------------------------------------------------- the whole way

SIZE_PX = (1280, 960)
DENSITY = CellDensity.per_field(60, 14, 4, SIZE_PX[0] * SIZE_PX[1] / SmearStyle().px_per_um ** 2)
SLIDE_FIELDS = 5
LEARN = 8


@dataclass(frozen=True, slots=True)
class Look:
    """A microscope and what lies under it. gains_bgr: of the lamp; blur_px: grows by `more_px` with each field."""

    style: SmearStyle = field(default_factory=SmearStyle.default)
    shares: Mapping[str, float] = field(default_factory=lambda: DEFAULT_SHARES)
    gains_bgr: tuple[float, float, float] = (1.0, 1.0, 1.0)
    blur_px: float = 0.6
    more_px: float = 0.0


def stronger(style: SmearStyle, factor: float) -> SmearStyle:
    """All dyes of the slide by this factor denser."""
    dyes = {name: getattr(style, name) for name in SmearStyle.__slots__ if name.endswith("_od")}
    return replace(style, **{name: tuple(factor * density for density in dye) for name, dye in dyes.items()})


WHOLE: Mapping[str, tuple[str, Look]] = {
    "nothing": ("", Look()),
    "a lamp 9 % warmer (red over green)": ("ground-red", Look(gains_bgr=(0.85, 0.92, 1.0))),
    "a stain 1.6 times as strong": ("stain-density", Look(style=stronger(SmearStyle.default(), 1.6))),
    "defocus by 0.1 px with each field": ("focus", Look(more_px=0.1)),
    "every second nucleated cell an eosinophil": (
        "share-eosinophil",
        Look(shares={**{name: share / 2 for name, share in DEFAULT_SHARES.items()}, "eosinophil": 0.5}),
    ),
}


def picture(look: Look, seed: int, number: int, before: int) -> Pixels:
    """The field of a slide as the camera gives it. before: fields since the disturbance began."""
    slide = SimulatedSlide(seed, style=look.style, density=DENSITY, shares=look.shares)
    width_um = SIZE_PX[0] / look.style.px_per_um
    pixels = slide.render(number * width_um, 0.0, *SIZE_PX)
    soft = cv2.GaussianBlur(pixels, (0, 0), look.blur_px + look.more_px * before)
    rng = np.random.default_rng((seed, number))
    lit = soft * np.asarray(look.gains_bgr) * rng.uniform(0.98, 1.02) + rng.normal(0, 2, soft.shape)
    return np.clip(lit, 0, 255).astype(np.uint8)


def see_slide(memory: DriftMemory, bench: Bench, look: Look, seed: int, before: int) -> tuple[DriftMemory, int]:
    """The memory after one slide, and how many of its fields passed the gate."""
    sample, passed = SampleState(f"s-{seed}"), 0
    for number in range(SLIDE_FIELDS):
        pixels = picture(look, seed, number, before + number)
        frame = Frame(number + 1, pixels, BEGIN + timedelta(seconds=number), 0, hash_pixels(pixels), "proof")
        outcome = process_frame(frame, sample, bench, ClockReading(True))
        outcome = with_drift(outcome, memory, bench.drift)
        passed += outcome.field is not None
        memory, sample = outcome.drift or memory, outcome.sample
    ended = with_drift(Outcome(replace(sample, phase="finished"), None), memory, bench.drift)
    assert ended.drift is not None
    return ended.drift, passed


def prove_the_whole_way(most_slides: int) -> list[str]:
    config = Config.model_validate({"drift": {"slides": LEARN}, "models": {"threads": 1}})
    bench = make_bench(config, open_models(config.models))
    assert bench.drift is not None
    learnt, faults, seed = DriftMemory(), [], 0
    for seed in range(1, LEARN + 1):
        learnt, _ = see_slide(learnt, bench, Look(), seed, 0)
    print(f"shipped models, baseline of {LEARN} simulated slides with {SLIDE_FIELDS} fields each")
    for words, (figure, look) in WHOLE.items():
        memory, told, passed = learnt, "", 0
        for number in range(1, most_slides + 1):
            memory, seen = see_slide(memory, bench, look, 100 + number, (number - 1) * SLIDE_FIELDS)
            passed += seen
            moved = {name: one.moved for name, one in read_drift(memory, bench.drift).figures.items() if one.moved}
            if moved and (figure in moved or not figure):
                told = f"told after {number} slides, {passed} fields: {moved.get(figure) or moved}"
                break
        print(f"{words}: {told or f'nothing told in {most_slides} slides, {passed} fields'}", flush=True)
        if bool(told) != bool(figure):
            faults.append(f"{words}: {told or 'not told'}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=30_000, help="undisturbed fields of each laboratory")
    parser.add_argument("--laboratories", type=int, default=5, help="numbers alone: how many; 0 = not at all")
    parser.add_argument("--repeats", type=int, default=25, help="of each disturbance")
    parser.add_argument("--cells", type=int, default=100, help="nucleated cells of a slide")
    parser.add_argument("--fleets", type=int, default=300, help="of each kind; 0 = not at all")
    parser.add_argument("--slides", type=int, default=6, help="the whole way: slides at most; 0 = not at all")
    asked = parser.parse_args()
    begun_s = time.monotonic()
    faults = []
    if asked.laboratories:
        faults += prove_numbers(asked.fields, asked.laboratories, asked.repeats, asked.cells)
    if asked.fleets:
        faults += prove_fleet(asked.fleets)
    if asked.slides:
        faults += prove_the_whole_way(asked.slides)
    print(f"{len(faults)} faults ({time.monotonic() - begun_s:.0f} s)", *faults, sep="\n  ")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
