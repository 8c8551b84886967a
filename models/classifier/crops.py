"""Crops that the classifier learns from: cells of every source, and things that are no cell.

Cut as the agent cuts them: a square around a box, the box being a little wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset

from agent.analysis.preprocessing import LOOK_SIDE_PX, TAUGHT_LOOK, Look, Relook
from agent.analysis.quality import shrink
from models.common.augment import soften, vary_look
from models.common.datasets import CentredBox, LabelledField, central_box, load_fields
from models.common.debris import smeared, with_debris
from models.common.labels import (
    CellImage,
    NamedBox,
    Rgb,
    read_complete_fields,
    read_field_platelets,
    read_foreign_cells,
    read_known_attributes,
    read_rgb,
)
from models.evaluation.names import cut_picture

UNKNOWN = -1
"""An index that is not known: no class, no value of the attribute."""

TAUGHT_SOURCE = "pbc"
"""The microscope that the taught look is of."""

PLATELET = "platelet"
"""The class without a nucleus."""

MARGIN = 0.2
"""The square is wider than the box's longer side by this share; goes into the manifest."""

LEAST_SIDE_PX = 12.0
"""px; smaller boxes are taken for this wide in training."""

RUIN_SHARE = (0.04, 0.07)
"""Sigma of a blur, as a share of the crop's side, behind which a cell has no name any more: 5 to 9 px of 128."""

SMEAR_SHARE = (0.35, 0.9)
"""Length, as a share of the crop's side, of the streaks into which a smeared cell is drawn out."""

MOST_OVERLAP = 0.05
"""Share of a crop without a cell that boxes of nucleated cells and platelets may cover."""


SURROUNDINGS = 3.2
"""Sides of the part of a picture that is kept around a cell, in sides of its box: the widest of training's crops,
turned by 45 degrees, takes 3.1. What lies beyond is as what lies beyond a picture's edge."""

KEPT_SIDE_PX = 160
"""px; in the part that is kept boxes are at most this wide: the closest of training's crops shows them 130 px wide."""


Spoil = Callable[[Rgb, Generator], Rgb]
"""Makes a square crop one that shows no cell."""


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """What a cell needs of its whole picture when only its surroundings are kept.

    small: the picture as `small_picture` gives it. share: of its shorter side that the longer one of the box takes.
    """

    small: Rgb
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One cell, or one place without a cell, in its picture.

    pixels: the picture, or a part of it; then `whole` is of all of it. box: where it is in it. label: class index,
    or UNKNOWN. attributes: value index or UNKNOWN by attribute. is_cell: whether a crop of it is to be taken for one.
    spoil: what is done to a crop of it until it shows no cell that has a name.
    has_look: its picture is of the microscope that the taught look is of, so that it needs not to be brought there.
    has_nucleus: it shows what a stain is told by. is_in_field: if it does not, others in its picture do.
    """

    pixels: Rgb
    box: CentredBox
    label: int
    attributes: tuple[int, ...]
    is_cell: bool = True
    spoil: Spoil | None = None
    has_look: bool = False
    has_nucleus: bool = True
    is_in_field: bool = False
    whole: Whole | None = None

    @property
    def share(self) -> float:
        """Of its whole picture's shorter side, what the longer one of the box takes."""
        return max(self.box[2:]) / min(self.pixels.shape[:2]) if self.whole is None else self.whole.share

    def without_the_rest(self, small: Rgb) -> Example:
        """The same cell with its surroundings only, a copy. small: of its picture; all cells of it may hold the same.

        Crops of it are the same where its box is at most KEPT_SIDE_PX wide, else to a grey level or so on average.
        """
        x, y, width, height = self.box
        side = max(width, height, LEAST_SIDE_PX)
        reach = side * SURROUNDINGS / 2
        left, top = max(0, int(x - reach)), max(0, int(y - reach))
        part = self.pixels[top : int(y + reach) + 1, left : int(x + reach) + 1]
        x, y, factor = x - left, y - top, min(1.0, KEPT_SIDE_PX / side)
        if factor == 1:
            part = part.copy()
        else:
            part = cv2.resize(part, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
            x, y = (x + 0.5) * factor - 0.5, (y + 0.5) * factor - 0.5  # a pixel's place is its middle
        box = (x, y, width * factor, height * factor)
        return replace(self, pixels=part, box=box, whole=Whole(small, self.share))


def small_picture(pixels: Rgb) -> Rgb:
    """A picture shrunk as it is before its look is taken: the look of both is the same."""
    return shrink(pixels, LOOK_SIDE_PX, 1)


class Wording:
    """Indices of classes and attribute values. values: by attribute, in the manifest's order."""

    def __init__(self, classes: Sequence[str], values: Mapping[str, Sequence[str]]):
        self.classes = tuple(classes)
        self.values = {name: tuple(found) for name, found in values.items()}
        self.no_attributes = (UNKNOWN,) * len(self.values)

    @property
    def sizes(self) -> list[int]:
        """How many values each attribute has."""
        return [len(found) for found in self.values.values()]

    def attribute_indices(self, row: Mapping[str, str] | None) -> tuple[int, ...]:
        """Value index of each attribute; UNKNOWN where the image has none."""
        if row is None:
            return self.no_attributes
        return tuple(found.index(row[name]) for name, found in self.values.items())


def pbc_examples(
    data: Path, cells: Sequence[CellImage], boxes: Mapping[str, CentredBox], wording: Wording
) -> list[Example]:
    """The single-cell images; where the detector saw nothing the box is guessed from the colours."""
    attributes = read_known_attributes(data)
    examples = []
    for cell in cells:
        pixels = read_rgb(cell.path)
        box = boxes.get(cell.key) or central_box(pixels)
        label = wording.classes.index(cell.class_name)
        indices = wording.attribute_indices(attributes.get(cell.key))
        has_nucleus = cell.class_name != PLATELET
        examples.append(Example(pixels, tuple(box), label, indices, has_look=True, has_nucleus=has_nucleus))
    return examples


def foreign_examples(data: Path, sources: Sequence[str], splits: Sequence[str], wording: Wording) -> list[Example]:
    """Cells of other microscopes that we named by eye, and boxes that hold none."""
    return named_examples(read_foreign_cells(data, splits), sources, wording)


def field_platelets(data: Path, sources: Sequence[str], splits: Sequence[str], wording: Wording) -> list[Example]:
    """The platelets of fields."""
    return named_examples(read_field_platelets(data, splits), sources, wording)


def named_examples(cells: Sequence[NamedBox], sources: Sequence[str], wording: Wording) -> list[Example]:
    """The cells of these sources, in their fields."""
    pictures: dict[Path, Rgb] = {}
    examples = []
    for cell in cells:
        if cell.source in sources:
            if cell.path not in pictures:
                pictures[cell.path] = read_rgb(cell.path)
            label = UNKNOWN if cell.class_name is None else wording.classes.index(cell.class_name)
            box = middle_of(cell.box)
            examples.append(
                Example(
                    pictures[cell.path],
                    box,
                    label,
                    wording.no_attributes,
                    is_cell=label != UNKNOWN,
                    has_look=cell.source == TAUGHT_SOURCE,
                    has_nucleus=cell.class_name not in (None, PLATELET),
                    is_in_field=True,
                )
            )
    return examples


def middle_of(corners: Sequence[float] | np.ndarray) -> CentredBox:
    """x_min, y_min, x_max, y_max as centre x, centre y, width and height."""
    x_min, y_min, x_max, y_max = (float(v) for v in corners)
    return (x_min + x_max) / 2, (y_min + y_max) / 2, x_max - x_min, y_max - y_min


def simulated_examples(crops: Sequence[tuple[Rgb, str]], wording: Wording) -> list[Example]:
    """Cells of the simulated slide, each in the middle of its picture."""
    return [
        Example(
            pixels,
            (pixels.shape[1] / 2, pixels.shape[0] / 2, 0.5 * pixels.shape[1], 0.5 * pixels.shape[0]),
            wording.classes.index(name),
            wording.no_attributes,
            has_nucleus=name != PLATELET,
        )
        for pixels, name in crops
    ]


def without_cells(data: Path, sources: Sequence[str], rng: Generator, wording: Wording) -> list[Example]:
    """Red cells and background of complete training fields: three red cells and one empty place of each."""
    fields = read_complete_fields(data, "train", sources)
    examples = []
    for image, field in zip(fields, load_fields(fields), strict=True):
        facts = {"has_look": image.source == TAUGHT_SOURCE, "has_nucleus": False, "is_in_field": True}
        red = field.boxes[field.boxes[:, 0] == 1]
        chosen = [red[k, 1:] for k in rng.permutation(len(red))[:3]]
        height, width = field.pixels.shape[:2]
        side = rng.uniform(24, 160)
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        chosen.append(np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2]))
        for box in chosen:
            if covered(field, box) <= MOST_OVERLAP:
                examples.append(
                    Example(field.pixels, middle_of(box), UNKNOWN, wording.no_attributes, is_cell=False, **facts)
                )
    return examples


def covered(field: LabelledField, box: np.ndarray) -> float:
    """Share of the crop around a box that nucleated cells and platelets cover."""
    grow = 0.5 * MARGIN * max(box[2] - box[0], box[3] - box[1])
    low, high = box[:2] - grow, box[2:] + grow
    others = field.boxes[field.boxes[:, 0] != 1, 1:]
    shared = np.clip(np.minimum(high, others[:, 2:]) - np.maximum(low, others[:, :2]), 0, None).prod(1)
    return float(shared.sum() / (high - low).prod())


def some(examples: Sequence[Example], count: int, rng: Generator) -> list[Example]:
    """At most so many of them, drawn at random."""
    return [examples[k] for k in rng.permutation(len(examples))[:count]]


def ruined(examples: Sequence[Example], rng: Generator, count: int) -> list[Example]:
    """Some of the cells once more, to be blurred or smeared until they have no name."""
    return spoilt(some(examples, count, rng), ruin)


def under_debris(examples: Sequence[Example], rng: Generator, count: int) -> list[Example]:
    """Some of the places without a cell once more, with dirt or grains of stain in their middle."""
    return spoilt(some(examples, count, rng), with_debris)


def spoilt(examples: Sequence[Example], spoil: Spoil) -> list[Example]:
    """The same as what is no cell."""
    return [
        replace(e, label=UNKNOWN, attributes=(UNKNOWN,) * len(e.attributes), is_cell=False, spoil=spoil)
        for e in examples
    ]


def ruin(crop: Rgb, rng: Generator) -> Rgb:
    """A cell out of focus, or smeared, beyond recognition."""
    if rng.random() < 0.5:
        return np.asarray(cv2.GaussianBlur(crop, (0, 0), rng.uniform(*RUIN_SHARE) * crop.shape[0]), np.uint8)
    return smeared(crop, rng.uniform(*SMEAR_SHARE), rng.uniform(0, 180))


class TrainingCrops(Dataset[tuple[Tensor, int, Tensor, float]]):
    """Items: uint8 RGB (3, side, side), class index, value index of each attribute, whether it is a cell (0 or 1).

    plain_share: of the crops, keeps the look of its own laboratory. normalised_share: of those of other microscopes,
    is brought to `look` before; cut_share: of those, by what a piece of the picture shows. soft_share: of the crops,
    loses its fine detail.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        side_px: int,
        plain_share: float = 0.125,
        normalised_share: float = 0.0,
        cut_share: float = 0.0,
        soft_share: float = 0.0,
        look: Look | None = TAUGHT_LOOK,
    ):
        self.examples = examples
        self.side_px = side_px
        self.plain_share = plain_share
        self.normalised_share = normalised_share
        self.cut_share = cut_share
        self.soft_share = soft_share
        self._relooks = Relooks(look)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor, float]:
        rng = np.random.default_rng(torch.randint(2**62, ()).item())
        example = self.examples[index]
        crop = random_crop(example.pixels, example.box, self.side_px, rng)
        if rng.random() < self.normalised_share and not example.has_look:
            is_cut = rng.random() < self.cut_share
            crop = self._relooks.cell_of_cut(crop, example, rng) if is_cut else self._relooks.cell(crop, example)
        if example.spoil is not None:
            crop = example.spoil(crop, rng)
        crop = vary_look(crop, rng, plain_share=self.plain_share)
        if rng.random() < self.soft_share and example.spoil is None:
            crop = soften(crop, rng)
        return picture_tensor(crop), example.label, torch.tensor(example.attributes), float(example.is_cell)


def random_crop(pixels: Rgb, box: CentredBox, side_px: int, rng: Generator) -> Rgb:
    """A square around the box as a detector might have drawn it, turned and mirrored, side_px wide.

    One in five is wider, up to twice the box: not everybody cuts as we do.
    """
    x, y, box_width, box_height = box
    side = max(box_width, box_height, LEAST_SIDE_PX) * (1 + MARGIN)
    side *= rng.uniform(1.1, 1.8) if rng.random() < 0.2 else np.exp(rng.normal(0, 0.09))
    x, y = x + rng.normal(0, 0.04) * side, y + rng.normal(0, 0.04) * side
    angle = rng.uniform(0, 2 * np.pi) if rng.random() < 0.5 else rng.integers(4) * np.pi / 2
    scale = side_px / side
    stretch = np.exp(rng.normal(0, 0.05))
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    turn = np.array([[cos * stretch, -sin], [sin, cos / stretch]]) @ np.diag([rng.choice((-1, 1)), 1])
    return warp(pixels, turn, x, y, side_px)


class Relooks:
    """Brings crops to a look as the agent does; what a picture needs for that is found once. look: None = they stay."""

    def __init__(self, look: Look | None):
        self._look = look
        self._whole: dict[int, tuple[Rgb, Relook]] = {}  # by the picture's id, which lasts as long as it is kept here
        self._cut: dict[int, tuple[Example, Relook, float]] = {}  # by the example's

    def cell(self, crop: Rgb, example: Example) -> Rgb:
        """The crop of an example in the look that its whole picture asks for."""
        if self._look is None:
            return crop
        pixels = example.pixels if example.whole is None else example.whole.small
        if id(pixels) not in self._whole:
            relook = self._measure(pixels, tells_stain=example.has_nucleus or example.is_in_field)
            self._whole[id(pixels)] = pixels, relook
        return bring(crop, self._whole[id(pixels)][1], example.share)

    def cell_of_cut(self, crop: Rgb, example: Example, rng: Generator) -> Rgb:
        """The same as if the agent had got a piece of the picture only, 1 to 4 times as wide as the cell.

        A piece shows less of ground and stain than a field, and people cut their pictures as they like.
        """
        if self._look is None:
            return crop
        if id(example) not in self._cut:
            piece = cut_picture(example.pixels, corners_of(example.box), rng.uniform(*PIECES))
            share = max(example.box[2:]) / min(piece.shape[:2])
            self._cut[id(example)] = example, self._measure(piece, tells_stain=example.has_nucleus), share
        _, relook, share = self._cut[id(example)]
        return bring(crop, relook, share)

    def _measure(self, pixels: Rgb, *, tells_stain: bool) -> Relook:
        assert self._look is not None
        look = self._look if tells_stain else self._look.without_stain
        return Relook.of(np.ascontiguousarray(pixels[..., ::-1]), look)


PIECES = (1.0, 4.0)
"""Sides of pictures that people cut, in sides of the cell's box."""


def bring(crop: Rgb, relook: Relook, share: float) -> Rgb:
    """The crop in the look; share: of its picture's shorter side that the cell takes."""
    return relook.cell(np.ascontiguousarray(crop[..., ::-1]), share)[..., ::-1]


def corners_of(box: CentredBox) -> tuple[float, float, float, float]:
    """x_min, y_min, x_max, y_max: the other way round than `middle_of`."""
    x, y, width, height = box
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def square(pixels: Rgb, box: CentredBox, side_px: int) -> Rgb:
    """The crop as the agent cuts it from a frame."""
    x, y, width, height = box
    return warp(pixels, np.eye(2) * side_px / (max(width, height) * (1 + MARGIN)), x, y, side_px)


def warp(pixels: Rgb, turn: np.ndarray, x: float, y: float, side_px: int) -> Rgb:
    """The picture through a 2 x 2 matrix, x and y in the middle, side_px wide, its edge repeated outside."""
    scale = float(np.sqrt(abs(np.linalg.det(turn))))
    reach = 1.5 * side_px / scale  # work on the surroundings only: blurring a whole field for one cell is slow
    left, top = max(0, int(x - reach)), max(0, int(y - reach))
    part = pixels[top : int(y + reach) + 1, left : int(x + reach) + 1]
    if not part.size:
        part, left, top = pixels, 0, 0
    if scale < 0.6:  # warpAffine does not average: avoid aliasing
        part = cv2.GaussianBlur(part, (0, 0), 0.35 / scale)
    shift = np.array([side_px / 2, side_px / 2]) - turn @ np.array([x - left, y - top])
    matrix = np.concatenate((turn, shift[:, None]), 1)
    return cv2.warpAffine(part, matrix, (side_px, side_px), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Fixed crops for judging a net: uint8 (n, 3, side, side), class index (n,), value indices (n, attributes)."""

    crops: Tensor
    labels: Tensor
    attributes: Tensor


def make_view(examples: Sequence[Example], side_px: int, look: Look | None = None) -> View:
    """Crops as the agent cuts them for a classifier of this look."""
    relooks = Relooks(look)
    squares = (relooks.cell(square(e.pixels, e.box, side_px), e) for e in examples)
    return View(
        torch.stack([picture_tensor(crop) for crop in squares]),
        torch.tensor([e.label for e in examples]),
        torch.tensor([e.attributes for e in examples]),
    )


def picture_tensor(pixels: Rgb) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
