"""Pictures of the simulated slide for training, drawn once and kept beside the run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np

import agent.camera
from models.common.datasets import LabelledField
from models.common.labels import DETECTOR_CLASSES, Rgb


def simulated_fields(count: int, cache: Path, seed: int = 7) -> list[LabelledField]:
    """`count` fields with boxes in the detector's classes, in a file below `cache`."""
    file = cache / f"simulated-fields-{count}-{seed}-{renderer_digest()}.npz"
    if not file.exists():
        from agent.camera import simulated

        rng = np.random.default_rng(seed)
        pictures, boxes = [], []
        for _ in range(count):
            width, height = ((640, 480), (480, 480), (576, 432))[rng.integers(3)]
            pixels, truth = simulated.render_training_field(rng, width, height)
            pictures.append(cv2.imencode(".png", pixels)[1])
            boxes.append(
                np.array(
                    [(_detector_class(name), b.x_min, b.y_min, b.x_max, b.y_max) for name, b in truth], np.float32
                ).reshape(-1, 5)
            )
        _store(file, pictures, boxes)
    stored = np.load(file, allow_pickle=True)
    return [
        LabelledField(_decode(coded), found) for coded, found in zip(stored["pictures"], stored["labels"], strict=True)
    ]


def simulated_crops(count: int, classes: tuple[str, ...], cache: Path, seed: int = 7) -> list[tuple[Rgb, str]]:
    """`count` single cells of each class with their class names, in a file below `cache`."""
    file = cache / f"simulated-crops-{count}-{seed}-{renderer_digest()}.npz"
    if not file.exists():
        from agent.camera import simulated

        rng = np.random.default_rng(seed)
        names = [name for name in classes for _ in range(count)]
        pictures = [cv2.imencode(".png", simulated.render_training_crop(rng, name, 192))[1] for name in names]
        _store(file, pictures, names)
    stored = np.load(file, allow_pickle=True)
    return [(_decode(coded), str(name)) for coded, name in zip(stored["pictures"], stored["labels"], strict=True)]


def renderer_digest() -> str:
    """Changes with the renderer's code, so that nobody trains on pictures of an older one."""
    camera = Path(agent.camera.__file__).parent
    code = b"".join((camera / name).read_bytes() for name in ("smear.py", "simulated.py"))
    return hashlib.sha256(code).hexdigest()[:8]


def _detector_class(name: str) -> int:
    """Everything with a nucleus is what the detector calls WBC."""
    return DETECTOR_CLASSES.index(name) if name in DETECTOR_CLASSES else 0


def _store(file: Path, pictures: list[np.ndarray], labels: list[object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    packed = np.empty(len(pictures), object), np.empty(len(labels), object)
    for row, values in zip(packed, (pictures, labels), strict=True):
        row[:] = values
    part = file.with_suffix(".part.npz")
    np.savez(part, pictures=packed[0], labels=packed[1])
    part.replace(file)


def _decode(coded: np.ndarray) -> Rgb:
    return cv2.cvtColor(cv2.imdecode(coded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
