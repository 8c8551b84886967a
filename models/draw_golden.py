"""Draw the golden fields: the pictures of the self-test, of the simulated slide.

    python -m models.draw_golden --output agent/inference/golden_fields

They are stored as PNG, because drawing uses the mathematics of the machine that draws and may differ by a grey level on
another one. Drawn anew they need new answers: `hematovision selftest --make-answers --models models`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from agent.camera.simulated import CellDensity, Optics, SimulatedSlide, expose
from agent.camera.smear import CELL_CLASSES, PLATELET
from models.common.programs import run_program

SIZE_PX = (480, 360)
SEEDS = {"a": 4, "b": 6, "c": 11}
"""Three slides that between them show every class, cut cells and cells that touch."""

DENSITY = CellDensity(red_cells=6, nucleated_cells=2.6, platelets=1.5)
OPTICS = Optics(blur_px=0.6, vignetting=0.1)
"""No noise: it says nothing of the models, and PNG would have to store it."""

EMPTY = "empty"
"""Bare glass: models that see cells everywhere are found out too."""


def main() -> None:
    args = parse()
    for name, pixels in draw().items():
        path = args.output / f"{name}.png"
        write_png(path, pixels)
        print(f"{path}: {path.stat().st_size} bytes")


def draw() -> dict[str, np.ndarray]:
    """Each field by its name; uint8, (360, 480, 3), B G R."""
    shares = {name: 1.0 for name in CELL_CLASSES if name != PLATELET}
    fields = {
        name: SimulatedSlide(seed, density=DENSITY, shares=shares).render(0, 0, *SIZE_PX)
        for name, seed in SEEDS.items()
    }
    fields[EMPTY] = SimulatedSlide(1, density=CellDensity(0, 0, 0)).render(0, 0, *SIZE_PX)
    rng = np.random.default_rng(1)
    return {name: expose(pixels, OPTICS, rng) for name, pixels in fields.items()}


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the fields; what is there by their names is overwritten"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
