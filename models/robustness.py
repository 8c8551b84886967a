"""What other stains, lamps and optics cost the shipped files, and what each step of the agent's preprocessing brings.

    python -m models.robustness --split val --json > models/figures/robustness.json
    python -m models.robustness --reference          # what the steps aim at, from the training fields

Each look is one fixed change of every picture; a model sees it after one step of preprocessing, or none. detector: mean
mAP50 on the complete fields. classifier: PBC pictures whose middle cell is found and named rightly, trusted or not.
agent: those that are counted rightly, with the thresholds and rules of the agent. microscopes: the cells of other
microscopes that we named by eye, named rightly in the boxes of the label files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from rich.console import Console
from rich.table import Table

from agent.analysis.preprocessing import look_lab, preprocess
from agent.analysis.quality import ground_colour
from agent.bench import Bench, make_bench
from agent.camera.decoding import decode_file
from agent.config import Config, PreprocessingSection
from agent.domain import Box, CellStatus, Pixels
from agent.inference.models import open_models
from models.common.augment import restain
from models.common.labels import (
    CellImage,
    FieldImage,
    NamedBox,
    Rgb,
    read_cells,
    read_complete_fields,
    read_fields,
    read_foreign_cells,
    require_some,
)
from models.common.metrics import detection_figures
from models.common.programs import run_program
from models.evaluation.asking import MAX_MEGAPIXELS, add_classifier, add_options, progress, section_of
from models.evaluation.boxes import field_boxes
from models.evaluation.counts import middle_cell
from models.evaluation.names import SeenField, by_field

STEPS = {
    "none": PreprocessingSection(),
    "denoise": PreprocessingSection(denoise=20),
    "white balance": PreprocessingSection(white_balance=True),
    "stain": PreprocessingSection(stain=True),
    "contrast": PreprocessingSection(contrast=2),
}


def main() -> None:
    args = parse()
    if args.reference:
        print(json.dumps(reference(args.data), indent=2))
        return
    bench = make_bench(Config(), open_models(section_of(args)))
    figures = {"what": "robustness", "split": args.split, **measure(bench, args.data, args.split, args.every)}
    print(json.dumps(figures)) if args.json else show(figures)


# ------------------------------------------------------------------------------------------------------- looks


def lamp(*gains_rgb: float) -> Callable[[Rgb, Generator], Rgb]:
    """Each channel times its gain."""
    return lambda pixels, _rng: levels(pixels * np.array(gains_rgb, np.float32))


def stained(*scales: float) -> Callable[[Rgb, Generator], Rgb]:
    """Amounts of haematoxylin and eosin, and what neither explains, each times its scale."""
    return lambda pixels, _rng: restain(pixels, np.diag(np.array(scales, np.float32)))


def noisy(pixels: Rgb, rng: Generator) -> Rgb:
    return levels(pixels + rng.normal(0, 12, pixels.shape).astype(np.float32))


def soft(pixels: Rgb, _rng: Generator) -> Rgb:
    """Out of focus by about 4 % of a red cell: the gate lets it pass."""
    return np.asarray(cv2.GaussianBlur(pixels, (0, 0), max(pixels.shape[:2]) / 220), np.uint8)


def coarse(pixels: Rgb, _rng: Generator) -> Rgb:
    _, coded = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, 25))
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)


def other_camera(pixels: Rgb, _rng: Generator) -> Rgb:
    """Hues turned by 16 degrees towards red, saturation a third higher."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + 8) % 180
    hsv[..., 1] = np.minimum(hsv[..., 1] * 1.33, 255)
    return np.asarray(cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB), np.uint8)


def faint(pixels: Rgb, _rng: Generator) -> Rgb:
    """Stray light: all contrast halved around the brightest tone."""
    bright = np.percentile(pixels, 95)
    return levels(bright + (pixels.astype(np.float32) - bright) * 0.5)


def levels(values: np.ndarray) -> Rgb:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


LOOKS: dict[str, Callable[[Rgb, Generator], Rgb]] = {
    "as it is": lambda pixels, _rng: pixels,
    "warm lamp": lamp(1.05, 0.95, 0.72),
    "cold lamp": lamp(0.78, 0.92, 1.05),
    "dim lamp": lamp(0.5, 0.5, 0.5),
    "blue stain": stained(1.5, 0.6, 1.0),
    "red stain": stained(0.75, 1.7, 1.0),
    "pale stain": stained(0.55, 0.55, 0.55),
    "other camera": other_camera,
    "stray light": faint,
    "soft": soft,
    "noise": noisy,
    "JPEG 25": coarse,
}


# --------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Pictures of one look, decoded: what each is of, and its pixels."""

    fields: Sequence[tuple[FieldImage, Pixels]]
    cells: Sequence[tuple[CellImage, Pixels]]
    foreign: Sequence[tuple[Sequence[NamedBox], Pixels]]


def measure(bench: Bench, data: Path, split: str, every: int) -> dict[str, Any]:
    """Figures by look and step."""
    fields = require_some(read_complete_fields(data, split), data, split)[::every]
    cells = require_some(read_cells(data, split), data, split)[::every]
    foreign = [cell for cell in read_foreign_cells(data, (split,)) if cell.class_name is not None]
    looks = {}
    for look, change in progress(LOOKS.items(), "looks"):
        seen = look_at(change, fields, cells, foreign)
        looks[look] = {
            step: measure_one(dataclasses.replace(bench, preprocessing=section), seen)
            for step, section in STEPS.items()
        }
    return {"fields": len(fields), "cells": len(cells), "foreign_cells": len(foreign), "every": every, "looks": looks}


def look_at(
    change: Callable[[Rgb, Generator], Rgb],
    fields: Sequence[FieldImage],
    cells: Sequence[CellImage],
    foreign: Sequence[NamedBox],
) -> Seen:
    """All pictures in one look; its noise is the same for every step."""
    rng = np.random.default_rng(3)

    def seen(path: Path) -> Pixels:
        pixels_rgb = np.ascontiguousarray(decode_file(path, MAX_MEGAPIXELS)[..., ::-1])
        return np.ascontiguousarray(change(pixels_rgb, rng)[..., ::-1])

    return Seen(
        [(field, seen(field.path)) for field in fields],
        [(cell, seen(cell.path)) for cell in cells],
        [(found, seen(path)) for path, found in by_field(foreign).items()],
    )


def measure_one(bench: Bench, seen: Seen) -> dict[str, float]:
    """One look behind the bench's preprocessing."""
    found = [field_boxes(bench.models, preprocess(pixels, bench.preprocessing), field) for field, pixels in seen.fields]
    named, counted = [], []
    for cell, pixels in seen.cells:
        middle = middle_cell(bench, pixels)
        named.append(middle is not None and middle.class_name == cell.class_name)
        counted.append(named[-1] and middle is not None and middle.status is not CellStatus.UNIDENTIFIED)
    elsewhere: list[bool] = []
    for cells, pixels in seen.foreign:
        field = SeenField.of(bench.models, preprocess(pixels, bench.preprocessing))
        elsewhere += [field.name(Box(*cell.box)).class_name == cell.class_name for cell in cells]
    return {
        "detector": detection_figures(found, bench.models.manifest.detector.classes)["all"].map50,
        "classifier": float(np.mean(named)),
        "agent": float(np.mean(counted)),
        "microscopes": float(np.mean(elsewhere)) if elsewhere else float("nan"),
    }


def reference(data: Path) -> dict[str, Any]:
    """What `agent.analysis.preprocessing` aims at: medians over the PBC training fields."""
    pixels = [decode_file(field.path, MAX_MEGAPIXELS) for field in read_fields(data, "train") if field.source == "pbc"]
    return {
        "GROUND_BGR": np.median([ground_colour(p) for p in pixels], axis=0).round(1).tolist(),
        "LOOK_LAB": np.median([look_lab(p) for p in pixels], axis=0).round(1).tolist(),
    }


def show(figures: dict[str, Any]) -> None:
    """A table for each kind of figure: looks by steps."""
    console = Console()
    for kind in ("detector", "classifier", "agent", "microscopes"):
        table = Table("look", *STEPS, title=f"{kind}, split {figures['split']}")
        for look, by_step in figures["looks"].items():
            table.add_row(look, *(f"{by_step[step][kind]:.3f}" for step in STEPS))
        console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, split="val")
    add_classifier(parser)
    parser.add_argument("--every", type=int, default=3, help="take each n-th field and picture")
    parser.add_argument("--reference", action="store_true", help="print what the steps aim at, and end")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
