"""The models' manifest: which files there are, what goes in, what comes out, and what made them.

A model file is used only if its SHA-256 is the one in the manifest: a swapped, truncated or edited file is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agent.analysis.differential import CellKind
from agent.analysis.preprocessing import Look
from agent.domain import ModelIdentity
from agent.errors import ClassifierUnknown, ModelError

MANIFEST_NAME = "manifest.json"

Share = Annotated[float, Field(ge=0, le=1)]


class ManifestPart(BaseModel):
    """A part of the manifest: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Tensor(ManifestPart):
    """An input or output: name in the file, shape and quantisation, real = scale * (stored - zero_point)."""

    name: str
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    dtype: Literal["int8", "uint8", "float32"]
    scale: float
    zero_point: int
    meaning: str


class Letterbox(ManifestPart):
    """How a frame of any shape fits the square input: scaled with its proportions kept, the rest filled."""

    align: Literal["centre"]
    fill: Annotated[int, Field(ge=0, le=255)]


class InputTensor(Tensor):
    """The picture that goes in: (1, height, width, 3), real values 0 to 1."""

    colour_order: Literal["RGB", "BGR"]
    letterbox: Letterbox | None = None
    """None = a square crop is resized to the input."""


class OutputTensor(Tensor):
    """A map of the detector, or logits of the classifier: of the classes, of attribute values, of "it is a cell"."""

    kind: Literal["box_distances", "class_scores", "class_logits", "attribute_logits", "cell_logit"]
    stride_px: int | None = None
    """px of the input from one place of the map to the next; detector only."""


class DetectorThresholds(ManifestPart):
    """Chosen on `val`."""

    min_score: Share
    same_cell_iou: Share | None = None
    """Of two boxes that overlap more than this the better stands. None = off, for a net that answers each cell once."""
    max_cells: Annotated[int, Field(ge=1)] = 1000


class ClassifierThresholds(ManifestPart):
    """Chosen on `val`; a cell named with less probability is `unidentified`."""

    min_probability: Share
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by this before the softmax (Guo et al. 2017, arXiv 1706.04599)."""
    min_cell_probability: Share = 0.0
    """Below it the crop is taken for something that has no name: debris, a smudge, a red cell."""
    sure_probability: Share = 0.0
    """A cell named with less is looked at from four sides; 0 = none is."""
    doubtful_probability: Share = 0.0
    """A cell that four sides name with less is looked at turned by a quarter too, so from eight; 0 = none is."""


Level = Annotated[float, Field(ge=0, le=255)]
Spread = tuple[Level, Annotated[float, Field(gt=0, le=255)]]


class CropLook(ManifestPart):
    """What the pictures looked like that the classifier was taught on.

    ground_bgr: grey levels of B, G, R where no cell lies. lab: mean and spread of L, a, b as OpenCV stores them; None =
    the stain stays as it is. told_by: detector classes of which a picture must show one, else its stain cannot be told
    and stays: without a nucleus in it the darkest that it shows would pass for one. () = any picture tells.
    """

    ground_bgr: tuple[Level, Level, Level]
    lab: tuple[Spread, Spread, Spread] | None = None
    told_by: tuple[str, ...] = ()


class Crop(ManifestPart):
    """How the classifier's crop is cut from a frame: a square around the box, wider by `margin` of its longer side."""

    margin: Annotated[float, Field(ge=0, le=4)]
    look: CropLook | None = None
    """Light and stain that the picture is brought to before; None = they stay as they are."""

    def as_look(self) -> Look | None:
        """The same in the words of `agent.analysis.preprocessing`."""
        return None if self.look is None else Look(self.look.ground_bgr, self.look.lab)

    def look_for(self, found: Collection[str]) -> Look | None:
        """The look that a picture is brought to in which the detector found these classes."""
        look = self.as_look()
        told_by = set() if self.look is None else set(self.look.told_by)
        is_told = not told_by or not told_by.isdisjoint(found)
        return look if look is None or is_told else look.without_stain


class Morphology(ManifestPart):
    """What the classifier can say of a cell's looks, and how people say it.

    attributes: values of each attribute, in the order of the logits. phrases: texts with attributes in braces, as
    "{nucleus_shape} nucleus"; words: for a value what stands in a phrase, null = the phrase is left out.
    """

    attributes: dict[str, Annotated[tuple[str, ...], Field(min_length=2)]]
    phrases: tuple[str, ...] = ()
    words: dict[str, dict[str, str | None]] = {}


class ModelEntry(ManifestPart):
    """What both kinds of model tell of themselves."""

    name: str
    version: str
    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    input: InputTensor
    outputs: tuple[OutputTensor, ...]
    classes: tuple[str, ...]
    data: str
    command: str

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(self.name, self.version, self.sha256)


class DetectorEntry(ModelEntry):
    """Finds cells. `classified`: those of its classes that go on to the classifier; the others it names alone.

    agreeing: for each classified class the classifier's classes that do not contradict it. contradicted: of the cells
    of all other classes the share that gets it all the same, on `val`; the classifier's word for them weighs as much
    less. None given = nothing is weighed. largest_in_red_cells: for
    classes of the classifier for which size decides where red cells are in sight, how large they are at most: sides of
    a typical red cell of the field.
    """

    role: Literal["detector"]
    thresholds: DetectorThresholds
    classified: tuple[str, ...]
    agreeing: dict[str, tuple[str, ...]] = {}
    contradicted: dict[str, Share] = {}
    largest_in_red_cells: dict[str, Annotated[float, Field(gt=0, le=10)]] = {}


class MeasuredConfusion(ManifestPart):
    """How often each class was named what, as the agent counts it: with its thresholds and rules.

    counts: by true class, then by name; `unidentified` and `missed` are names too. It is only true of the model that
    it was measured on, so it carries that model's digest.
    """

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    measured_on: str
    counts: dict[str, dict[str, Annotated[int, Field(ge=0)]]]


class ClassifierEntry(ModelEntry):
    """Names cells."""

    role: Literal["classifier"]
    thresholds: ClassifierThresholds
    crop: Crop
    morphology: Morphology | None = None
    """None = off: the model does not describe cells, or is not asked to."""
    confusion: MeasuredConfusion | None = None
    """For the corrected column of a differential; None = there is no such column."""

    @property
    def own_confusion(self) -> MeasuredConfusion | None:
        """The confusion of this very file; one that was measured on another file says nothing of it."""
        return self.confusion if self.confusion is not None and self.confusion.sha256 == self.sha256 else None


class Manifest(ManifestPart):
    """The whole file."""

    manifest: Literal[1]
    detector: DetectorEntry
    classifier: ClassifierEntry
    other_classifiers: tuple[ClassifierEntry, ...] = ()
    """Any of them takes the place of `classifier` where the configuration names it (`models.classifier`)."""
    cell_kinds: dict[str, CellKind] = {}
    """What each class is to a differential; without it there is none."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Manifest:
        """What no single key can tell: classes, maps and rules must belong together."""
        detector = self.detector
        _check_tensors(detector, "detector")
        for output in detector.outputs:
            if output.kind in ("box_distances", "class_scores"):
                _require(len(output.shape) == 4, f"output {output.name}: shape: must be 1, rows, columns, values")
                is_grid = output.stride_px is not None and output.shape[1] * output.stride_px == detector.input.shape[1]
                _require(is_grid, f"output {output.name}: rows times stride_px is not the input's side")
        _require(set(detector.classified) <= set(detector.classes), "detector.classified: unknown class")
        weighed = {*detector.agreeing, *detector.contradicted}
        _require(weighed <= set(detector.classified), "detector.agreeing, contradicted: unknown class")
        self._check_classifier(self.classifier, "classifier")
        for entry in self.other_classifiers:
            _require(bool(FILE_NAME.match(entry.name)), f"other_classifiers: {entry.name!r} names no file of answers")
            self._check_classifier(entry, f"other_classifiers, {entry.name}")
        names = [entry.name for entry in self.classifiers]
        _require(len(set(names)) == len(names), "other_classifiers: two classifiers of one name")
        return self

    def _check_classifier(self, classifier: ClassifierEntry, where: str) -> None:
        """In itself, and beside the detector. where: words for the entry's place."""
        _check_tensors(classifier, where)
        _check_heads(classifier, where)
        detector = self.detector
        told_by = set() if classifier.crop.look is None else set(classifier.crop.look.told_by)
        _require(told_by <= set(detector.classes), f"{where}.crop.look.told_by: unknown class")
        named = {name for names in detector.agreeing.values() for name in names} | set(detector.largest_in_red_cells)
        fault = f"detector.agreeing, largest_in_red_cells: unknown class of {where}"
        _require(named <= set(classifier.classes), fault)
        counted = {*classifier.classes, *(name for name in detector.classes if name not in detector.classified)}
        _require(set(self.cell_kinds) <= counted, "cell_kinds: a class that is never counted")
        measured = set() if classifier.confusion is None else set(classifier.confusion.counts)
        _require(measured <= set(classifier.classes), f"{where}.confusion: unknown class")

    @property
    def classifiers(self) -> tuple[ClassifierEntry, ...]:
        """The one that is used where none is named, and the others."""
        return (self.classifier, *self.other_classifiers)

    @property
    def entries(self) -> tuple[DetectorEntry | ClassifierEntry, ...]:
        """Every model that a folder of models holds."""
        return (self.detector, *self.classifiers)

    def choosing(self, name: str | None) -> Manifest:
        """The same with the classifier of this name as `classifier`; None = as it stands. Raises ClassifierUnknown."""
        if name is None:
            return self
        found = {entry.name: entry for entry in self.classifiers}
        if name not in found:
            raise ClassifierUnknown(
                f"these models have no classifier {name}, but {', '.join(sorted(found))}:"
                " name one of them (models.classifier in the configuration), or none for the first"
            )
        others = tuple(entry for entry in self.classifiers if entry.name != name)
        return self.model_copy(update={"classifier": found[name], "other_classifiers": others})


FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}\Z")
"""What may stand in the name of a file of answers."""


def _check_tensors(entry: DetectorEntry | ClassifierEntry, where: str) -> None:
    """A square picture in; as many values as classes out."""
    _, height, width, channels = entry.input.shape if len(entry.input.shape) == 4 else (0, 0, 1, 0)
    _require(height == width and channels == 3, f"{where}.input.shape: must be 1, side, side, 3")
    for output in entry.outputs:
        if output.kind in ("class_scores", "class_logits"):
            fits = output.shape[-1] == len(entry.classes)
            _require(fits, f"{where}, output {output.name}: its last size is not the classes'")


def _check_heads(classifier: ClassifierEntry, where: str) -> None:
    """One output of a kind, the classes always; attributes that fill their output."""
    kinds = [output.kind for output in classifier.outputs]
    _require(len(set(kinds)) == len(kinds), f"{where}.outputs: two of one kind")
    _require("class_logits" in kinds, f"{where}.outputs: one of kind class_logits is needed")
    sizes = {output.kind: output.shape[-1] for output in classifier.outputs}
    _require(sizes.get("cell_logit", 1) == 1, f"{where}.outputs: cell_logit must be one number")
    morphology = classifier.morphology
    if morphology is not None:
        values = sum(len(found) for found in morphology.attributes.values())
        _require(sizes.get("attribute_logits") == values, f"{where}.morphology: its values are not the output's")
        named = {field for phrase in morphology.phrases for _, field, _, _ in Formatter().parse(phrase) if field}
        unknown = (named | set(morphology.words)) - set(morphology.attributes)
        _require(not unknown, f"{where}.morphology: unknown attribute {', '.join(sorted(unknown))}")


def _require(is_met: bool, fault: str) -> None:
    if not is_met:
        raise ValueError(fault)


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of models. Errors: `ModelError` where it is missing or has faults."""
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(
            f"{path}: there is no model manifest here; set models.folder to a folder that has one"
        ) from None
    except (OSError, UnicodeDecodeError) as cause:
        raise ModelError(f"{path}: cannot be read ({cause})") from cause
    try:
        return Manifest.model_validate(json.loads(text))
    except json.JSONDecodeError as cause:
        raise ModelError(f"{path}: not valid JSON, line {cause.lineno}: {cause.msg}") from cause
    except ValidationError as cause:
        faults = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in cause.errors())
        raise ModelError(
            f"{path}: not a manifest of this agent ({faults}); install the package again or set models.folder"
        ) from cause
    except (ValueError, RecursionError) as cause:  # a number of thousands of digits, a thousand brackets
        raise ModelError(f"{path}: not a manifest: {str(cause)[:200]}; install the package again") from cause


def read_model_file(folder: Path, entry: ModelEntry) -> bytes:
    """The bytes of a model file, exactly those whose digest was checked.

    Errors: `ModelError` where the file is missing or its SHA-256 differs from the manifest's.
    """
    path = folder / entry.file
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise ModelError(
            f"{path}: the {entry.name} model cannot be read ({cause.strerror}); install the package again"
            " or set models.folder"
        ) from cause
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry.sha256:
        raise ModelError(
            f"{path}: refused, its SHA-256 is {digest[:16]}..., the manifest says {entry.sha256[:16]}..."
            f" ({len(content)} bytes). The file was altered, truncated or swapped: install the package again"
        )
    return content
