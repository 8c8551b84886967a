"""How often the gate decides right, and what it costs: `python -m tests.proofs.gate [--split test]`.

Each device of the public data is one microscope. Its fields come in a shuffled row: as they are, with the small changes
that a good frame may have, and degraded on purpose. The gate starts without knowledge and learns along the row, so its
first decisions count like all others. Then a live camera: a field at rest with fresh noise (`unchanged`), a stage on
its way (`moving`), a stage that has come to rest elsewhere (to be accepted).

A decision is right when a good frame is accepted and a bad one refused, whatever the reason; that the reason is right
too is shown beside. Fails (exit 1) below the bounds.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from statistics import median

import cv2
import numpy as np
from numpy.random import Generator

from agent.analysis.quality import GateMemory, assess_frame
from agent.bench import make_bench
from agent.camera.hashing import hash_pixels
from agent.config import Config, QualitySection
from agent.domain import ClockReading, Frame, Pixels, SampleState
from agent.inference.models import open_models
from agent.pipeline import Stopwatch, analyse_frame
from tests.proofs.degrading import BAD, GOOD, RealField, has_whole_cell, real_fields, with_gain, with_noise

DEVICES = ("bccd", "pbc", "raabin")
RIGHT_AT_LEAST = 0.98
COST_AT_MOST = 0.05
"""Median time of a refused frame over that of an analysed one, in the same run on the same frames."""

LIVE_STEP_NS = 40_000_000
PAUSE_NS = 2_000_000_000

Labelled = tuple[str, str, Frame]
"""What the frame is (a reason, or `good`), how it was made, the frame."""


def make_frame(number: int, pixels_bgr: Pixels, at_ns: int) -> Frame:
    """A frame of a live camera."""
    pixels = np.ascontiguousarray(pixels_bgr)
    return Frame(number, pixels, datetime.now(timezone.utc), at_ns, hash_pixels(pixels), "proof")


def single_frames(fields: list[RealField], rng: Generator) -> Iterator[Labelled]:
    """A row in which about half of the frames are good, each a field for itself."""
    chosen = []
    for field in fields:
        good = [name for name in GOOD if name != "a lonely cell" or has_whole_cell(field)]
        for name in ("as it is", *rng.permutation(good[1:])[:2]):
            chosen.append(("good", name, field, GOOD[name]))
        for name in rng.permutation(list(BAD))[:3]:
            chosen.append((name, name, field, BAD[name]))
    for number, place in enumerate(rng.permutation(len(chosen)), start=1):
        label, name, field, make = chosen[place]
        yield label, name, make_frame(number, make(field, rng), number * PAUSE_NS)


def live_frames(fields: list[RealField], rng: Generator) -> Iterator[Labelled]:
    """For each field: a rest, a glide, and a rest elsewhere; windows of three quarters of the field."""
    now_ns = 0
    number = 0
    for field in fields:
        height, width = (side * 3 // 4 for side in field.pixels_bgr.shape[:2])
        spare_x, spare_y = field.pixels_bgr.shape[1] - width, field.pixels_bgr.shape[0] - height
        way = [(share * spare_x, share * spare_y) for share in (0, 0, 0, 0.25, 0.5, 0.75, 1)]
        labels = ["good", "unchanged", "unchanged", "moving", "moving", "moving", "moving"]
        for (x, y), label in zip(way, labels, strict=True):
            now_ns += PAUSE_NS if label == "good" else LIVE_STEP_NS
            number += 1
            window = field.pixels_bgr[round(y) : round(y) + height, round(x) : round(x) + width]
            yield label, f"live {label}", make_frame(number, _exposed(window, rng), now_ns)
        now_ns += LIVE_STEP_NS
        yield "good", "live, at rest", make_frame(number + 1, _exposed(window, rng), now_ns)
        number += 1


def _exposed(window: Pixels, rng: Generator) -> Pixels:
    return with_noise(with_gain(window, rng.uniform(0.98, 1.02)), rng)


def decide(rows: Iterator[Labelled], section: QualitySection) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Label, making, reasons of the gate; learning along the row."""
    memory = GateMemory()
    for label, making, frame in rows:
        quality, memory = assess_frame(frame, section, memory)
        yield label, making, quality.reasons


def cost_ratio(fields: list[RealField], repeats: int = 3) -> float:
    """Median over frames of the gate's time as a share of the analysis of the same frame."""
    config = Config()
    bench = make_bench(config, open_models(config.models))
    shares = []
    for field in fields:
        frame = make_frame(1, cv2.GaussianBlur(field.pixels_bgr, (0, 0), 0.1 * field.red_cell_px), 0)
        quality, _ = assess_frame(frame, config.quality, GateMemory())
        gate_s = min(_timed(lambda f=frame: assess_frame(f, config.quality, GateMemory())) for _ in range(repeats))
        sharp = make_frame(1, field.pixels_bgr, 0)
        analysis_s = min(
            _timed(
                lambda f=sharp, q=quality: analyse_frame(
                    f, q, bench, SampleState("proof"), ClockReading(is_synchronised=True), Stopwatch()
                )
            )
            for _ in range(repeats)
        )
        shares.append(gate_s / analysis_s)
    return median(shares)


def _timed(call) -> float:
    begun_s = time.perf_counter()
    call()
    return time.perf_counter() - begun_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show-wrong", action="store_true")
    arguments = parser.parse_args()
    section = QualitySection()
    right: Counter[str] = Counter()
    right_reason: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    device_right: Counter[str] = Counter()
    device_seen: Counter[str] = Counter()
    sample = []
    for device in DEVICES:
        rng = np.random.default_rng((arguments.seed, DEVICES.index(device)))
        fields = real_fields(arguments.split, device)
        if not fields:
            print(f"no fields of {device}, {arguments.split}: is ../shared/data there?")
            continue
        sample += fields[:10]
        # In the shuffled row a field may come again made otherwise: here that is no repeat.
        every_frame = section.model_copy(update={"skip_unchanged": False})
        rows = [*decide(single_frames(fields, rng), every_frame), *decide(live_frames(fields[:25], rng), section)]
        for place, (label, making, reasons) in enumerate(rows):
            is_right = (label == "good") == (not reasons)
            seen[making] += 1
            right[making] += is_right
            right_reason[making] += is_right and (label == "good" or label in reasons)
            device_seen[device] += 1
            device_right[device] += is_right
            if arguments.show_wrong and not is_right:
                print(f"wrong: {device} {place}: {making}: {', '.join(reasons) or 'accepted'}")
    if not seen:
        return 2
    print(f"{'made':<20} {'frames':>6} {'right':>7} {'and by its reason':>18}")
    for making, frames in seen.items():
        print(f"{making:<20} {frames:>6} {right[making] / frames:>7.1%} {right_reason[making] / frames:>18.1%}")
    for device in device_seen:
        print(f"device {device:<13} {device_seen[device]:>6} {device_right[device] / device_seen[device]:>7.1%}")
    share = right.total() / seen.total()
    cost = cost_ratio(sample)
    print(f"all decisions        {seen.total():>6} {share:>7.2%}   bound {RIGHT_AT_LEAST:.0%}")
    print(f"cost of a refused frame: {cost:.1%} of an analysed one   bound {COST_AT_MOST:.0%}")
    return 0 if share >= RIGHT_AT_LEAST and cost <= COST_AT_MOST else 1


if __name__ == "__main__":
    raise SystemExit(main())
