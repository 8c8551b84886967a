"""Frames, and a bench to work them on; its models are doubles that say what the test wants."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

from agent.analysis.cells import NamingRules
from agent.analysis.crops import CropCutter
from agent.bench import Bench
from agent.camera.hashing import hash_pixels
from agent.config import QualitySection
from agent.delivery.topics import Topics
from agent.domain import Box, Classification, ClockReading, Detection, Frame, ModelIdentity, Pixels, Provenance

CLOCK = ClockReading(is_synchronised=True, offset_ms=0.5)
WHITE = Detection(Box(10, 10, 20, 22), "white", 0.9)
RED = Detection(Box(30, 12, 40, 21), "red", 0.8)


def make_pixels(seed: int = 1, width_px: int = 64, height_px: int = 48) -> Pixels:
    """A light ground with a little noise and some dark discs: what the gate lets through."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(195, 205, (height_px, width_px, 3)).astype(np.uint8)
    for x, y in rng.uniform(0, 1, (8, 2)):
        cv2.circle(pixels, (int(x * width_px), int(y * height_px)), max(2, height_px // 10), (120, 110, 130), -1)
    return pixels


def make_frame(
    seed: int = 1, *, key: str | None = None, repeats_last: bool = False, pixels: Pixels | None = None
) -> Frame:
    pixels = make_pixels(seed) if pixels is None else pixels
    return Frame(
        number=seed,
        pixels_bgr=pixels,
        captured_at=datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc),
        captured_monotonic_ns=time.monotonic_ns() + (seed - 600) * 10**9,  # a second apart: the stage stood still
        sha256=hash_pixels(pixels),
        source=f"frame {seed}",
        origin_key=key,
        repeats_last=repeats_last,
    )


def make_models(detections: tuple[Detection, ...], answer: Callable[[Pixels], Classification] | None = None) -> Any:
    """Models that see the same cells in every frame; `white` goes on to the classifier, `red` does not."""

    def classify(_crop: Pixels) -> Classification:
        return Classification("round", 0.75, {"round": 0.75, "lobed": 0.25})

    return SimpleNamespace(
        detector=SimpleNamespace(
            detect=lambda _pixels, _min_score=None: detections, identity=ModelIdentity("d", "1", "0" * 64)
        ),
        classifier=SimpleNamespace(classify=answer or classify, identity=ModelIdentity("c", "1", "1" * 64)),
        manifest=SimpleNamespace(
            detector=SimpleNamespace(classified=("white",)),
            classifier=SimpleNamespace(crop=SimpleNamespace(margin=0.2)),
        ),
        cutter=lambda pixels, _detections: CropCutter(pixels, 0.2, None),
        runtime="double 1.0",
        delegate="none",
    )


def make_bench(models: Any = None, *, with_cells: bool = True, min_probability: float = 0.5) -> Bench:
    models = models or make_models((WHITE, RED))
    return Bench(
        models=models,
        quality=QualitySection(),
        min_score=None,
        rules=NamingRules(min_probability, {"white": ("round", "lobed")}),
        provenance=Provenance(
            "0.0", models.detector.identity, models.classifier.identity, models.runtime, models.delegate, "2" * 64
        ),
        topics=Topics("site", "dev"),
        with_cells=with_cells,
    )
