"""Golden fields: pictures that came with the agent, and what a folder of models is known to answer to them.

    golden_fields/*.png --both models--> GoldenField <--differences--> golden.json
    (with the agent)                                                   (beside manifest.json)

The answers belong to two model files and name them by their SHA-256: other models need other answers, and are told so.
Making them is one command, `hematovision selftest --make-answers`, for who has convinced himself by other means
(`python -m models.evaluate`) that the models are good: the answers say what is right from then on.

Two ways to compare
  * bit by bit, where the same kind of machine works with the same runtime and delegate, and the same numbers went into
    the models: then every stored number of every output must be the same. So it must be with the device's own first
    answer, whatever the machine.
  * within a tolerance, else. One int8 detector, asked by LiteRT 2.3 on x86-64 with XNNPACK, the same without it, and on
    aarch64 without it, gave scores that differ by 0.01 in the middle and by up to 0.18: each rounds in its own way, and
    the steps add up over the layers. The tolerances below were set on that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Annotated, Final, Literal

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.domain import Classification, Detection, Pixels
from agent.errors import ModelError
from agent.files import write_durably
from agent.inference.manifest import Manifest

ANSWERS_NAME = "golden.json"
"""Answers of the models that are used where the configuration names no classifier."""
FIELDS_FOLDER = Path(__file__).resolve().parent / "golden_fields"

MEND = "`hematovision selftest --make-answers` makes new ones, once you know by other means that the models are good"

SCORE_TOLERANCE: Final = 0.25
"""0 to 1; of a cell's score. Also how far above the threshold a cell may be missing or too many."""

MEAN_SCORE_TOLERANCE: Final = 0.06
"""0 to 1; of the mean of a field's scores, which rounding moves by 0.02: a model that sees less is found out."""

CELLS_TOLERANCE: Final = 0.1
"""Share of a field's cells that may come or go near the threshold, and at least one."""

PROBABILITY_TOLERANCE: Final = 0.15
"""0 to 1; measured: 0.08."""

BOX_TOLERANCE: Final = 0.05
"""Of the cell's longer side, and at least 1 px; measured: 0.02."""

LOOKS_TOLERANCE: Final = 0.3
"""0 to 1; of the probability of an attribute, of which many are near a tie, and which add up to no count; measured:
0.21."""

SAME_CELL_IOU: Final = 0.5

Share = Annotated[float, Field(ge=0, le=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class AnswersPart(BaseModel):
    """A part of the stored answers: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Looks(AnswersPart):
    """An attribute of a cell."""

    value: str
    probability: Share


class GoldenCell(AnswersPart):
    """One cell as the models see it. box: px of the field. probabilities: empty where the detector alone names it."""

    box: tuple[float, float, float, float]
    found_as: str
    score: Share
    probabilities: dict[str, Share] = {}
    cell_probability: Share | None = None
    looks: dict[str, Looks] = {}

    @property
    def name(self) -> str:
        """The likeliest class, the detector's where nothing else is known."""
        return max(self.probabilities, key=lambda name: self.probabilities[name], default=self.found_as)


class Numbers(AnswersPart):
    """SHA-256 of all stored numbers that went into a model for one field, and of all that came out."""

    inputs_sha256: Digest
    outputs_sha256: Digest


class GoldenField(AnswersPart):
    """The answer to one field."""

    pixels_sha256: Digest
    detector: Numbers
    classifier: Numbers
    cells: tuple[GoldenCell, ...]


class GoldenAnswers(AnswersPart):
    """The whole file: which models, who asked them, and what they said to each field by its name."""

    golden: Literal[1]
    detector_sha256: Digest
    classifier_sha256: Digest
    machine: str
    runtime: str
    delegate: str
    fields: dict[str, GoldenField]


def read_fields(folder: Path = FIELDS_FOLDER) -> Mapping[str, Pixels]:
    """The pictures by name, in order. Raises ModelError: there are none, or one cannot be read."""
    fields: dict[str, Pixels] = {}
    for path in sorted(folder.glob("*.png")):
        try:
            content = path.read_bytes()
            # An empty buffer is an error of its own kind to OpenCV.
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}; install the package again") from error
        if pixels is None:
            raise ModelError(f"{path}: this golden field is no picture; install the package again")
        fields[path.stem] = np.asarray(pixels, np.uint8)
    if not fields:
        raise ModelError(f"{folder}: the golden fields are missing; install the package again")
    return MappingProxyType(fields)


def answers_name(classifier: str | None) -> str:
    """Name of the file of answers beside the manifest. classifier: its name where it is one of the others."""
    return ANSWERS_NAME if classifier is None else f"golden-{classifier}.json"


def answers_names(manifest: Manifest) -> tuple[str, ...]:
    """Names of the files of answers of all models that a manifest holds."""
    return (answers_name(None), *(answers_name(entry.name) for entry in manifest.other_classifiers))


def read_answers(folder: Path, name: str = ANSWERS_NAME) -> GoldenAnswers:
    """The answers that lie beside the models of a folder. Raises ModelError."""
    path = folder / name
    try:
        return GoldenAnswers.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: these models have no known answers to the golden fields; {MEND}") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}; install the package again") from error
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ModelError(f"{path}: {place or 'the whole'}: {fault['msg']}; {MEND}") from error


def write_answers(folder: Path, answers: GoldenAnswers, name: str = ANSWERS_NAME) -> Path:
    """Put the answers beside the models, whole or not at all. Raises ModelError where the disk does not take them."""
    path = folder / name
    text = json.dumps(answers.model_dump(mode="json"), indent=1)
    try:
        write_durably(path, f"{text}\n".encode())
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror}; free space, or mend the rights") from error
    return path


def pixels_sha256(pixels_bgr: Pixels) -> str:
    """64 hex digits of the pixels' bytes and the shape."""
    digest = hashlib.sha256(repr(pixels_bgr.shape).encode())
    digest.update(np.ascontiguousarray(pixels_bgr).data)
    return digest.hexdigest()


def golden_cell(detection: Detection, classification: Classification | None) -> GoldenCell:
    """A cell for the file, rounded far below the tolerances. Raises ModelError where it holds what is no share."""
    box = detection.box
    sides = (box.x_min, box.y_min, box.x_max, box.y_max)
    shares = {} if classification is None else classification.probabilities
    morphology = {} if classification is None else classification.morphology
    try:
        return GoldenCell(
            box=(round(sides[0], 3), round(sides[1], 3), round(sides[2], 3), round(sides[3], 3)),
            found_as=detection.class_name,
            score=round(detection.score, 5),
            probabilities={name: round(share, 5) for name, share in shares.items()},
            cell_probability=None if classification is None else round(classification.cell_probability, 5),
            looks={
                name: Looks(value=attribute.value, probability=round(attribute.probability, 5))
                for name, attribute in morphology.items()
            },
        )
    except ValidationError as error:
        raise ModelError("the models answer, but not with numbers and shares from 0 to 1") from error


# ---------------------------------------------------------------------------------------------------- comparing


def broken_bits(known: GoldenField, found: GoldenField) -> tuple[bool, tuple[str, ...]]:
    """Whether all could be compared bit by bit, and the models that made other numbers of the same ones.

    Other numbers out of the detector make other crops, so that nothing can be said of the classifier then.
    """
    is_whole, faults = True, []
    for role, then, now in (
        ("detector", known.detector, found.detector),
        ("classifier", known.classifier, found.classifier),
    ):
        if then.inputs_sha256 != now.inputs_sha256:
            is_whole = False
        elif then.outputs_sha256 != now.outputs_sha256:
            faults.append(f"the {role} is given the same numbers as ever and makes others of them")
    return is_whole, tuple(faults)


def differences(known: GoldenField, found: GoldenField, min_score: float) -> tuple[str, ...]:
    """What is not within the tolerance, in words; empty = the same answer. min_score: the detector's threshold."""
    left, faults, pairs, come_or_gone = list(found.cells), [], [], 0
    for cell in known.cells:
        twin = max(left, key=lambda other: _iou(cell, other), default=None)
        if twin is not None and _iou(cell, twin) >= SAME_CELL_IOU:
            left.remove(twin)
            pairs.append((cell, twin))
        elif cell.score >= min_score + SCORE_TOLERANCE:
            faults.append(f"{_where(cell)} is not found")
        else:
            come_or_gone += 1
    for cell in left:
        if cell.score >= min_score + SCORE_TOLERANCE:
            faults.append(f"{_where(cell)} is found and should not be")
        else:
            come_or_gone += 1
    if come_or_gone > max(1.0, CELLS_TOLERANCE * len(known.cells)):
        faults.append(f"{come_or_gone} faint cells of {len(known.cells)} have come or gone")
    off = fmean(now.score - then.score for then, now in pairs) if pairs else 0.0
    if abs(off) > MEAN_SCORE_TOLERANCE:
        faults.append(f"the scores are off by {off:+.3f} on average")
    for cell, twin in pairs:
        faults.extend(f"{_where(cell)}: {fault}" for fault in _cell_faults(cell, twin))
    return tuple(faults)


def _cell_faults(known: GoldenCell, found: GoldenCell) -> Sequence[str]:
    faults = []
    if found.found_as != known.found_as:
        faults.append(f"found as {found.found_as}, not {known.found_as}")
    if abs(found.score - known.score) > SCORE_TOLERANCE:
        faults.append(f"score {found.score:.3f}, not {known.score:.3f}")
    longer_px = max(known.box[2] - known.box[0], known.box[3] - known.box[1])
    off_px = max(abs(now - then) for now, then in zip(found.box, known.box, strict=True))
    if off_px > max(1.0, BOX_TOLERANCE * longer_px):
        faults.append(f"its box is off by {off_px:.1f} px")
    names = sorted({*known.probabilities, *found.probabilities})
    shares = [(name, known.probabilities.get(name, 0.0), found.probabilities.get(name, 0.0)) for name in names]
    shares.append(("a cell", known.cell_probability or 0.0, found.cell_probability or 0.0))
    off = max(shares, key=lambda share: abs(share[1] - share[2]))
    if abs(off[1] - off[2]) > PROBABILITY_TOLERANCE:
        faults.append(f"{off[0]} with {off[2]:.3f}, not {off[1]:.3f}")
    for name, look in known.looks.items():
        other = found.looks.get(name)
        if other is None or not _looks_alike(look, other):
            faults.append(f"{name} is {'not told' if other is None else other.value}, not {look.value}")
    return faults


def _looks_alike(known: Looks, found: Looks) -> bool:
    """Another value only where both were near a tie."""
    if known.value == found.value:
        return abs(known.probability - found.probability) <= LOOKS_TOLERANCE
    return max(known.probability, found.probability) <= 0.5 + LOOKS_TOLERANCE / 2


def _where(cell: GoldenCell) -> str:
    x, y = (cell.box[0] + cell.box[2]) / 2, (cell.box[1] + cell.box[3]) / 2
    return f"the {cell.name} at {x:.0f}, {y:.0f} px"


def _iou(first: GoldenCell, second: GoldenCell) -> float:
    """Shared over joint area of two boxes, 0 to 1."""
    (a, b, c, d), (e, f, g, h) = first.box, second.box
    shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    joint = (c - a) * (d - b) + (g - e) * (h - f) - shared
    return shared / joint if joint > 0 and math.isfinite(joint) else 0.0
