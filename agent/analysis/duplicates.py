"""Each cell of a slide counted once, while its fields come one after another and overlap.

    SlideMap.observe(frame, cells) --> Observation: the cells with their standing, what the field adds to the slide, and
    its Trace            SlideMap.add(trace): only when the field is stored; from the traces the map can be made again

Where a field lies: from the stage, where the camera tells it; else by registering it to the fields before it and around
it (`agent.analysis.registration`); else its place is unknown, and it begins a part of the slide of its own.

What counts, in a stream in which nothing that was sent can be changed
  1. A cell that reaches over the right or the lower edge of a field is not counted there; one that reaches over the
     left or the upper edge is: the two-sides rule of the haemocytometer. It counts the lower right corners of cells, so
     fields side by side count each cell once even where nothing overlaps.
  2. The first view that may be counted is. Later views of the same cell are `duplicate`, with `duplicate_of`.
  3. A better view takes the place of the standing one (`supersedes`): a whole cell before a cut one, a named one before
     an `unidentified` one, a name that is surer by BETTER_BY. `unique_counts` then moves the cell to its new class: it
     may say -1 for the old one.
  4. What a person has named stands for good (`hold`).
  5. What stays on one pixel and looks the same while the slide moves is dirt: from its third appearance in a row
     `artefact`, and what was counted of it is taken back.

Pure; memory is bounded by the number of cells and fields: some 4 kB a field, of which the picture has the most.
"""

from __future__ import annotations

import base64
import json
import math
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.analysis.cells import EDGE_PX, UNIDENTIFIED, cell_number
from agent.analysis.registration import Shift, View, from_jpeg, register, take_view, to_jpeg
from agent.domain import Cell, CellStatus, Frame

Boxes = NDArray[np.float64]
"""(n, 4): x_min, y_min, x_max, y_max in frame pixels."""

Source = Literal["stage", "registered", "unknown"]

BETTER_BY: Final = 0.2
"""Probability by which a later view must be surer to take the standing one's place: so that names do not flicker."""

SAME_WHOLE: Final = 0.4
"""Intersection over union from which two whole boxes at one place are one cell. Boxes of one cell from two fields reach
0.7 and more, those of two touching cells 0.1."""

SAME_CUT: Final = 0.6
"""Share of a cut box that must lie in the other one."""

LEAST_SEEN_PX: Final = 3.0
"""px; of a cell less of which lies in both fields nothing can be said."""

STAGE_PART: Final = 0
NEIGHBOURS: Final = 8
STEPS_REMEMBERED: Final = 3
VIEWS_DECODED: Final = 48

FIELDS_REMEMBERED: Final = 4096
"""The newest ones, some 12 kB each, so that an agent that counts for ever does not need ever more memory; more than ten
smears have. Of older ones only what their cells count for stays: who comes back to their place counts it anew."""
SEARCH_SIDE_PX: Final = 32
SEARCH_BLOCK: Final = 256
"""Fields that are looked at together when a field is lost; 3 MB for as long as it takes, a few us a field."""
SEARCH_BEST: Final = 4

DIRT_APPEARANCES: Final = 3
"""In a row. One cell in 500 lies on the pixels of one of the field before by chance; most of these look otherwise."""
DIRT_SHARE: Final = 0.12
"""Of its size, by which dirt may seem to move and to change between two fields: the detector's own unrest."""
DIRT_LOOK: Final = 0.8
"""Normalised correlation of its pixels in two fields. White cells that a microscope brings to the middle of each field
reach 0.7, so where the slide is not known to have moved nothing is called dirt."""

RASTER: Final = 24
"""Points a side at which a field is asked whether another one shows this place too."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a field lies: its upper left corner and turn within its part of the slide, frame pixels and radians."""

    source: Source
    part: int
    shift: Shift

    @property
    def confidence(self) -> float:
        return 0.0 if self.source == "unknown" else self.shift.agreement


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What the map keeps of one field.

    numbers: of its cells' ids. roots: the number of the first view of each one's cell. is_standing: this view counts.
    merged: pairs of roots, the second of which is the first one's cell. withdrawn: roots that are no cells. stuck: of
    each cell the numbers of the views before that lay on the same pixels.
    """

    place: Place
    size_px: tuple[int, int]
    factor: int
    picture: bytes
    boxes: Boxes
    numbers: tuple[int, ...]
    roots: tuple[int, ...]
    is_standing: tuple[bool, ...]
    names: tuple[str, ...]
    merits: tuple[float, ...]
    merged: tuple[tuple[int, int], ...] = ()
    withdrawn: tuple[int, ...] = ()
    stuck: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """A field as part of its slide.

    unique_counts: what it adds to the slide by class, may be negative. new_share: of its area, 0 to 1, that no field
    before it has shown.
    """

    cells: tuple[Cell, ...]
    unique_counts: Mapping[str, int]
    duplicates: int
    new_share: float
    place: Place
    trace: Trace


class SlideMap:
    """What is known of one slide; belongs to one thread. sid: the sample whose cells these are."""

    def __init__(self, sid: str) -> None:
        self.sid = sid
        self._fields: dict[int, Trace] = {}
        self._count = 0
        self._grid: dict[tuple[int, int, int], list[int]] = {}
        self._parts = 1
        self._views: OrderedDict[int, View] = OrderedDict()
        self._steps: list[Shift] = []
        # Of field n its spectrum stands in place n % FIELDS_REMEMBERED, counted through the blocks.
        self._search: list[NDArray[np.complex64]] = []
        # By number of the cell's id: the root of its cell, and of a root the number that stands, 0 for none.
        self._root = array("i")
        self._stands = array("i")
        self._name = array("B")
        self._merit = array("f")
        self._names: list[str] = []

    @property
    def fields(self) -> int:
        return self._count

    # ---- looking

    def observe(self, frame: Frame, cells: Sequence[Cell]) -> Observation:
        """The field's cells, each new, seen before, or dirt; nothing of it is remembered until `add`."""
        view = take_view(frame.pixels_bgr)
        size_px = (frame.width_px, frame.height_px)
        place, neighbours = self._locate(view, frame)
        boxes = _boxes(cells)
        matches = self._match(boxes, size_px, neighbours)
        stuck = self._find_stuck(view, boxes, place)
        observation = self._settle(cells, boxes, size_px, view, place, matches, stuck)
        return replace(observation, new_share=_new_share(size_px, neighbours))

    def _settle(
        self,
        cells: Sequence[Cell],
        boxes: Boxes,
        size_px: tuple[int, int],
        view: View,
        place: Place,
        matches: Sequence[tuple[int, ...]],
        stuck: Sequence[tuple[int, ...]],
    ) -> Observation:
        added: Counter[str] = Counter()
        settled, roots, standing, names, merits = [], [], [], [], []
        merged: list[tuple[int, int]] = []
        withdrawn: list[int] = []
        claimed: set[int] = set()
        for index, cell in enumerate(cells):
            number, name = cell_number(cell.cell_id), _count_key(cell)
            is_whole, may_count = _is_whole(boxes[index], size_px), _may_count(boxes[index], size_px)
            merit = 4.0 * is_whole + 2.0 * (cell.status is not CellStatus.UNIDENTIFIED) + cell.probability
            seen = matches[index]
            root = min(seen, default=number)
            counted = [other for other in seen if self._stands[other]]
            stands = False
            if len(stuck[index]) + 1 >= DIRT_APPEARANCES:
                views = dict.fromkeys(self._find_root(view_number) for view_number in stuck[index])
                taken_back = [
                    other
                    for other in views
                    if self._stands[other] and other not in withdrawn and not math.isinf(self._merit[other])
                ]
                withdrawn += taken_back
                for other in taken_back:
                    added[self._name_of(other)] -= 1
                old = tuple(self._cell_id(self._stands[other]) for other in taken_back)
                cell = replace(cell, status=CellStatus.ARTEFACT, is_counted=False, supersedes=old)
                root = number
            elif not counted and may_count and root not in claimed:
                added[name] += 1
                stands = True
                cell = replace(cell, is_counted=True)
            elif (
                counted
                and may_count
                and merit > max(self._merit[other] for other in counted) + BETTER_BY
                and claimed.isdisjoint(seen)
            ):
                added[name] += 1
                for other in counted:
                    added[self._name_of(other)] -= 1
                stands = True
                old = tuple(self._cell_id(self._stands[other]) for other in counted)
                cell = replace(cell, is_counted=True, supersedes=old)
                merged += [(root, other) for other in seen if other != root]
            elif seen:
                first = self._stands[counted[0]] if counted else root
                cell = replace(cell, status=CellStatus.DUPLICATE, duplicate_of=self._cell_id(first), is_counted=False)
            else:
                cell = replace(cell, is_counted=False)
            claimed.update(seen)
            settled.append(cell)
            roots.append(root)
            standing.append(stands)
            names.append(name)
            merits.append(round(merit, 3))
        trace = Trace(
            place,
            size_px,
            view.factor,
            to_jpeg(view),
            np.round(boxes, 1),
            tuple(cell_number(cell.cell_id) for cell in cells),
            tuple(roots),
            tuple(standing),
            tuple(names),
            tuple(merits),
            tuple(merged),
            tuple(withdrawn),
            tuple(stuck),
        )
        return Observation(
            tuple(settled),
            MappingProxyType({name: count for name, count in sorted(added.items()) if count}),
            sum(cell.status is CellStatus.DUPLICATE for cell in settled),
            1.0,
            place,
            trace,
        )

    # ---- remembering

    def hold(self, cell_id: str) -> None:
        """A person has named this cell: no later view takes its place, and it is not taken back as dirt."""
        number = cell_number(cell_id)
        if number < len(self._root) and self._stands[root := self._find_root(number)]:
            self._merit[root] = math.inf

    def add(self, trace: Trace) -> None:
        """Take a stored field into the map."""
        field = self._count
        for number, root, stands, name, merit in zip(
            trace.numbers, trace.roots, trace.is_standing, trace.names, trace.merits, strict=True
        ):
            self._grow(number)
            self._root[number] = root
            if stands:
                self._stands[root] = number
                self._merit[root] = merit
                self._name[root] = self._name_index(name)
        for root, other in trace.merged:
            self._root[other] = root
            self._stands[other] = 0
        for root in trace.withdrawn:
            self._stands[root] = 0
        if self._fields and self._last.place.part == trace.place.part and trace.place.source != "stage":
            step = trace.place.shift.then(self._last.place.shift.inverse())
            self._steps = [step, *(old for old in self._steps if math.hypot(old.x - step.x, old.y - step.y) > 40)]
            del self._steps[STEPS_REMEMBERED:]
        self._fields[field] = trace
        self._count += 1
        self._parts = max(self._parts, trace.place.part + 1)
        self._grid.setdefault(self._square(trace.place, trace.size_px), []).append(field)
        self._remember_search(field)
        self._forget(field - FIELDS_REMEMBERED)

    @property
    def _last(self) -> Trace:
        return self._fields[self._count - 1]

    def _forget(self, field: int) -> None:
        """No longer look for this field, nor match with its boxes; what its cells count for stays."""
        trace = self._fields.pop(field, None)
        if trace is not None:
            square = self._square(trace.place, trace.size_px)
            self._grid[square].remove(field)
            if not self._grid[square]:
                del self._grid[square]
            self._views.pop(field, None)

    def _grow(self, number: int) -> None:
        while len(self._root) <= number:
            self._root.append(len(self._root))
            self._stands.append(0)
            self._name.append(0)
            self._merit.append(0.0)

    def _find_root(self, number: int) -> int:
        while self._root[number] != number:
            number = self._root[number]
        return number

    def _name_index(self, name: str) -> int:
        if name not in self._names:
            self._names.append(name)
        return self._names.index(name)

    def _name_of(self, root: int) -> str:
        return self._names[self._name[root]]

    def _cell_id(self, number: int) -> str:
        return f"{self.sid}-{number}"

    # ---- the place

    def is_lost(self, frame: Frame) -> bool:
        """Whether the frame lies at no place of this slide that is known, and has something to be compared with."""
        if not self._fields:
            return False
        return self._locate(take_view(frame.pixels_bgr), frame)[0].source == "unknown"

    def _locate(self, view: View, frame: Frame) -> tuple[Place, list[tuple[Trace, Shift]]]:
        """The field's place, and the fields around it with the shift to each."""
        size_px = (frame.width_px, frame.height_px)
        if frame.stage_um is not None and frame.um_per_px is not None:
            x, y = (um / frame.um_per_px for um in frame.stage_um)
            place = Place("stage", STAGE_PART, Shift(x, y))
            return place, self._around(view, place, size_px, {})
        anchor = self._anchor(view)
        if anchor is None:
            return Place("unknown", self._parts, Shift(0.0, 0.0)), []
        field, shift = anchor
        old = self._fields[field]
        place = Place("registered", old.place.part, shift.then(old.place.shift))
        place = replace(place, shift=replace(place.shift, agreement=shift.agreement))
        return place, self._around(view, place, size_px, {field: shift})

    def _anchor(self, view: View) -> tuple[int, Shift] | None:
        """A field that this one overlaps with certainty, and the shift to it: the last one, those around it, any."""
        if not self._fields:
            return None
        last = self._count - 1
        shift = register(view, self._view(last), (*self._steps, *(step.inverse() for step in self._steps)))
        if shift is not None:
            return last, shift
        place, size_px = self._fields[last].place, self._fields[last].size_px
        nearest = [field for field in self._near(place, size_px, 1.5) if field != last][:3]
        for field in dict.fromkeys((*nearest, *self._look_alikes(view))):
            shift = register(view, self._view(field))
            if shift is not None:
                return field, shift
        return None

    def _around(
        self, view: View, place: Place, size_px: tuple[int, int], known: Mapping[int, Shift]
    ) -> list[tuple[Trace, Shift]]:
        """The fields that overlap a place, with the shift to each: measured, else as the map has it."""
        found = [(self._fields[field], shift) for field, shift in known.items()]
        for field in self._near(place, size_px, 1.0):
            if field in known:
                continue
            guess = place.shift.then(self._fields[field].place.shift.inverse())
            # From the stage the guess may be off by its slack: then the pictures are searched where they share enough.
            is_slack = place.source == "stage" and _shared(guess, size_px) > 0.12
            found.append((self._fields[field], register(view, self._view(field), (guess,), searches=is_slack) or guess))
        return found

    def _near(self, place: Place, size_px: tuple[int, int], reach: float) -> list[int]:
        """Fields of a part that lie within `reach` frames, nearest first, at most NEIGHBOURS."""
        part, column, row = self._square(place, size_px)
        fields = [
            field
            for x in (column - 1, column, column + 1)
            for y in (row - 1, row, row + 1)
            for field in self._grid.get((part, x, y), ())
        ]
        away = {}
        for field in fields:
            shift = place.shift.then(self._fields[field].place.shift.inverse())
            dx, dy = abs(shift.x) / size_px[0], abs(shift.y) / size_px[1]
            if max(dx, dy) < reach:
                away[field] = dx + dy
        return sorted(away, key=away.__getitem__)[:NEIGHBOURS]

    def _square(self, place: Place, size_px: tuple[int, int]) -> tuple[int, int, int]:
        side = 1.5 * max(size_px)
        return place.part, math.floor(place.shift.x / side), math.floor(place.shift.y / side)

    def _view(self, field: int) -> View:
        view = self._views.get(field)
        if view is None:
            view = self._views[field] = from_jpeg(self._fields[field].picture, self._fields[field].factor)
            if len(self._views) > VIEWS_DECODED:
                self._views.popitem(last=False)
        else:
            self._views.move_to_end(field)
        return view

    def _look_alikes(self, view: View) -> list[int]:
        """Fields whose small pictures correlate best with this one at any shift."""
        wanted = _search_spectrum(view).conj()
        tops = np.concatenate(
            [np.fft.irfft2(block * wanted, (SEARCH_SIDE_PX, SEARCH_SIDE_PX)).max(axis=(1, 2)) for block in self._search]
        )[: len(self._fields)]
        # The place of a field in the blocks comes again with each FIELDS_REMEMBERED fields.
        oldest = self._count - len(self._fields)
        best = np.argsort(tops)[::-1][:SEARCH_BEST]
        return [oldest + (int(place) - oldest) % FIELDS_REMEMBERED for place in best]

    def _remember_search(self, field: int) -> None:
        block, place = divmod(field % FIELDS_REMEMBERED, SEARCH_BLOCK)
        if block == len(self._search):
            self._search.append(np.zeros((SEARCH_BLOCK, SEARCH_SIDE_PX, SEARCH_SIDE_PX // 2 + 1), np.complex64))
        self._search[block][place] = _search_spectrum(self._view(field))

    # ---- the cells

    def _match(
        self, boxes: Boxes, size_px: tuple[int, int], neighbours: Iterable[tuple[Trace, Shift]]
    ) -> list[tuple[int, ...]]:
        """For each box the roots of the cells that it shows again."""
        roots: list[dict[int, None]] = [{} for _ in boxes]
        for trace, shift in neighbours:
            for new, old in match_boxes(boxes, size_px, trace.boxes, trace.size_px, shift):
                roots[new][self._find_root(trace.numbers[old])] = None
        return [tuple(found) for found in roots]

    # ---- dirt

    def _find_stuck(self, view: View, boxes: Boxes, place: Place) -> list[tuple[int, ...]]:
        """For each box the numbers of the views before it, in a row, that lay on its pixels and looked like it."""
        if not self._has_moved(place):
            return [() for _ in boxes]
        last, before = self._last, self._view(self._count - 1)
        found: list[tuple[int, ...]] = []
        for box in boxes:
            index = _same_pixels(box, last.boxes)
            if index is None or not _looks_alike(view, before, box):
                found.append(())
            else:
                found.append((*last.stuck[index], last.numbers[index])[-DIRT_APPEARANCES:])
        return found

    def _has_moved(self, place: Place) -> bool:
        """Whether the slide is known to lie elsewhere than in the field before: no cell is on the same pixel then."""
        if not self._fields or self._last.place.part != place.part:
            return False
        step = place.shift.then(self._last.place.shift.inverse())
        return math.hypot(step.x, step.y) > 0.05 * max(self._last.size_px)


# ------------------------------------------------------------------------------------------------------ the boxes


def match_boxes(
    new: Boxes, new_size_px: tuple[int, int], old: Boxes, old_size_px: tuple[int, int], shift: Shift
) -> list[tuple[int, int]]:
    """Pairs (new, old) that show one cell: at the same place within what both fields show; each box once."""
    if not len(new) or not len(old):
        return []
    back = shift.inverse()
    moved = _moved(old, back)
    corners = back.apply_all(np.asarray([[0, 0], [old_size_px[0], 0], [0, old_size_px[1]], list(old_size_px)], float))
    left, top = (max(0.0, float(np.sort(corners[:, axis])[1])) for axis in (0, 1))
    right, bottom = (min(float(new_size_px[axis]), float(np.sort(corners[:, axis])[2])) for axis in (0, 1))
    if right - left < LEAST_SEEN_PX or bottom - top < LEAST_SEEN_PX:
        return []
    a, b = _cut(new, left, top, right, bottom), _cut(moved, left, top, right, bottom)
    size_a, size_b = _area(a), _area(b)
    width = np.minimum(a[:, None, 2], b[None, :, 2]) - np.maximum(a[:, None, 0], b[None, :, 0])
    height = np.minimum(a[:, None, 3], b[None, :, 3]) - np.maximum(a[:, None, 1], b[None, :, 1])
    both = np.clip(width, 0, None) * np.clip(height, 0, None)
    union = size_a[:, None] + size_b[None] - both
    overlap = both / np.maximum(union, 1e-6)
    is_cut_a = (size_a < 0.98 * _area(new)) | _touches(new, new_size_px)
    is_cut_b = (size_b < 0.98 * _area(old)) | _touches(old, old_size_px)
    # A cut box must lie in the other, which shows more of the cell; a sliver's box does not tell the cell's height.
    in_b = np.where(is_cut_a[:, None], both / np.maximum(size_a[:, None], 1e-6), 0)
    in_a = np.where(is_cut_b[None], both / np.maximum(size_b[None], 1e-6), 0)
    contained = np.maximum(
        np.where(size_a[:, None] <= 1.3 * size_b, in_b, 0), np.where(size_b <= 1.3 * size_a[:, None], in_a, 0)
    )
    score = np.where(overlap >= SAME_WHOLE, 1 + overlap, np.where(contained >= SAME_CUT, contained * 0.5 + overlap, 0))
    thin = (np.minimum(a[:, 2] - a[:, 0], a[:, 3] - a[:, 1]) < LEAST_SEEN_PX)[:, None]
    thin = thin | (np.minimum(b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]) < LEAST_SEEN_PX)[None]
    score = np.where(thin, 0, score)
    pairs: list[tuple[int, int]] = []
    while True:
        index = int(score.argmax())
        row, column = divmod(index, score.shape[1])
        if score[row, column] <= 0:
            return pairs
        pairs.append((row, column))
        score[row], score[:, column] = 0, 0


def _moved(boxes: Boxes, shift: Shift) -> Boxes:
    """The boxes in another frame; turned by their middle, for a turn of 2 degrees leaves their sides what they are."""
    middles = shift.apply_all((boxes[:, :2] + boxes[:, 2:]) / 2)
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    return np.concatenate((middles - half, middles + half), axis=1)


def _cut(boxes: Boxes, left: float, top: float, right: float, bottom: float) -> Boxes:
    return np.stack(
        [
            np.clip(boxes[:, 0], left, right),
            np.clip(boxes[:, 1], top, bottom),
            np.clip(boxes[:, 2], left, right),
            np.clip(boxes[:, 3], top, bottom),
        ],
        axis=1,
    )


def _area(boxes: Boxes) -> NDArray[np.float64]:
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def _touches(boxes: Boxes, size_px: tuple[int, int]) -> NDArray[np.bool_]:
    low = boxes[:, :2].min(axis=1) < EDGE_PX
    return np.asarray(low | (boxes[:, 2] > size_px[0] - EDGE_PX) | (boxes[:, 3] > size_px[1] - EDGE_PX))


def _same_pixels(box: NDArray[np.float64], boxes: Boxes) -> int | None:
    """The box that lies on the same pixels of the frame, edge by edge."""
    if not len(boxes):
        return None
    tolerance = max(2.0, DIRT_SHARE * max(box[2] - box[0], box[3] - box[1]))
    away = np.abs(boxes - box).max(axis=1)
    index = int(away.argmin())
    return index if away[index] <= tolerance else None


def _looks_alike(view: View, other: View, box: NDArray[np.float64]) -> bool:
    """Whether two views show the same within a box and a little around it."""
    if view.relief.shape != other.relief.shape:
        return False
    height, width = view.relief.shape
    rim = 1.0
    left, top = (max(0, math.floor(edge / view.factor - rim)) for edge in box[:2])
    right, bottom = (math.ceil(edge / view.factor + rim) for edge in box[2:])
    a, b = (one.relief[top : min(bottom, height), left : min(right, width)] for one in (view, other))
    if a.size < 9:
        return False
    return float(cv2.matchTemplate(a, b, cv2.TM_CCOEFF_NORMED)[0, 0]) >= DIRT_LOOK


def _new_share(size_px: tuple[int, int], neighbours: Iterable[tuple[Trace, Shift]]) -> float:
    x, y = np.meshgrid((np.arange(RASTER) + 0.5) / RASTER * size_px[0], (np.arange(RASTER) + 0.5) / RASTER * size_px[1])
    points = np.stack((x.ravel(), y.ravel()), axis=1)
    is_new = np.ones(len(points), bool)
    for trace, shift in neighbours:
        there = shift.apply_all(points)
        is_new &= ~((there >= 0) & (there < trace.size_px)).all(axis=1)
    return float(is_new.mean())


def _shared(shift: Shift, size_px: tuple[int, int]) -> float:
    """Share of a frame that it has in common with one that lies this far away."""
    return max(0.0, 1 - abs(shift.x) / size_px[0]) * max(0.0, 1 - abs(shift.y) / size_px[1])


def _search_spectrum(view: View) -> NDArray[np.complex64]:
    small = cv2.resize(view.half, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)[:SEARCH_SIDE_PX, :SEARCH_SIDE_PX]
    spectrum = np.fft.rfft2(small - small.mean(), (SEARCH_SIDE_PX, SEARCH_SIDE_PX))
    return np.asarray(spectrum / (np.abs(spectrum) + 1e-3), np.complex64)


def _boxes(cells: Sequence[Cell]) -> Boxes:
    boxes = [cell.detection.box for cell in cells]
    return np.asarray([(box.x_min, box.y_min, box.x_max, box.y_max) for box in boxes], np.float64).reshape(-1, 4)


def _count_key(cell: Cell) -> str:
    return UNIDENTIFIED if cell.status is CellStatus.UNIDENTIFIED else cell.class_name


def _is_whole(box: NDArray[np.float64], size_px: tuple[int, int]) -> bool:
    return bool(min(box[0], box[1]) >= EDGE_PX and box[2] <= size_px[0] - EDGE_PX and box[3] <= size_px[1] - EDGE_PX)


def _may_count(box: NDArray[np.float64], size_px: tuple[int, int]) -> bool:
    """Two-sides rule: cut at the left or the upper edge counts, at the right or the lower one it does not."""
    return bool(box[2] <= size_px[0] - EDGE_PX and box[3] <= size_px[1] - EDGE_PX)


# -------------------------------------------------------------------------------------------------- as text, on disk


def trace_to_text(trace: Trace) -> str:
    """A trace as one line of JSON, some 5 kB."""
    shift = trace.place.shift
    return json.dumps(
        {
            "place": [trace.place.source, trace.place.part, shift.x, shift.y, shift.turn, shift.agreement],
            "size_px": trace.size_px,
            "factor": trace.factor,
            "picture": base64.b64encode(trace.picture).decode("ascii"),
            "boxes": trace.boxes.tolist(),
            "numbers": trace.numbers,
            "roots": trace.roots,
            "stands": [int(stands) for stands in trace.is_standing],
            "names": trace.names,
            "merits": trace.merits,
            "merged": trace.merged,
            "withdrawn": trace.withdrawn,
            "stuck": trace.stuck,
        },
        separators=(",", ":"),
    )


def trace_from_text(text: str) -> Trace:
    """The trace again. Raises ValueError for a text that is none."""
    try:
        stored: dict[str, Any] = json.loads(text)
        source, part, x, y, turn, agreement = stored["place"]
        width, height = stored["size_px"]
        return Trace(
            Place(source, int(part), Shift(x, y, turn, agreement)),
            (int(width), int(height)),
            int(stored["factor"]),
            base64.b64decode(stored["picture"]),
            np.asarray(stored["boxes"], np.float64).reshape(-1, 4),
            tuple(stored["numbers"]),
            tuple(stored["roots"]),
            tuple(bool(stands) for stands in stored["stands"]),
            tuple(stored["names"]),
            tuple(stored["merits"]),
            tuple((first, second) for first, second in stored["merged"]),
            tuple(stored["withdrawn"]),
            tuple(tuple(views) for views in stored["stuck"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the trace of a field: {error}") from error


def map_from_traces(sid: str, texts: Iterable[str]) -> SlideMap:
    """The map of a slide as it was after the last stored field."""
    slide = SlideMap(sid)
    for text in texts:
        slide.add(trace_from_text(text))
    return slide
