"""Each cell of a slide counted once, while its fields come one after another and overlap.

    SlideMap.observe(frame, cells) --> Observation: the cells with their standing, what the field adds to the slide, and
    its Trace            SlideMap.add(trace): only when the field is stored; from the traces the map can be made again

Where a field lies: from the stage, where the camera tells it; else by registering it to the fields before it and around
it (`agent.analysis.registration`); else its place is unknown, and it begins a part of the slide of its own. Two parts
of which one field shows a place each are one from then on.

What counts, in a stream in which nothing that was sent can be changed
  1. A cell that reaches over the right or the lower edge of a field is not counted there; one that reaches over the
     left or the upper edge is: the two-sides rule of the haemocytometer. It counts the lower right corners of cells, so
     fields side by side count each cell once even where nothing overlaps. Where another field shows more of a cell that
     an edge cuts, that field decides whether it is one.
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
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Any, Final, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.analysis.cells import EDGE_PX, UNIDENTIFIED, cell_number
from agent.analysis.registration import Shift, View, Witness, from_jpeg, register, take_view, to_jpeg
from agent.domain import Cell, CellStatus, Frame

Boxes = NDArray[np.float64]
"""(n, 4): x_min, y_min, x_max, y_max in frame pixels."""

Source = Literal["stage", "registered", "unknown"]

BETTER_BY: Final = 0.2
"""Probability by which a later view must be surer to take the standing one's place: so that names do not flicker."""

SAME_WHOLE: Final = 0.4
"""Intersection over union from which two whole boxes at one place are one cell. Boxes of one cell from two fields reach
0.7 and more, those of two touching cells 0.1."""

SAME_PIECE: Final = 0.6
"""The same for what a narrow strip shows of a cell, of WITNESSES cells and more."""
WITNESSES: Final = 3

SAME_CUT: Final = 0.6
"""Share of a cut box that must lie in the other one."""

SIDE_PX: Final = 8.0
SIDE_SHARE: Final = 0.35
"""Of the shorter of two boxes: how far apart the two may see one side of a cell; SIDE_PX at least."""

CUT_BEYOND: Final = 0.3
"""Of a box's longer side: a field that shows so much more of a cut cell, beyond the edge, decides whether it is one."""

LEAST_SEEN_PX: Final = 3.0
"""px; of a cell less of which lies in both fields its box says nothing."""
SLACK_PX: Final = np.asarray([-4.0, -4.0, 4.0, 4.0])
"""px, to each side: how far boxes and places are off."""

STAGE_PART: Final = 0
NEIGHBOURS: Final = 8
STEPS_REMEMBERED: Final = 3
RECENT: Final = 3
"""Fields before the last one that a lost field is compared with first: who looks at a place again mostly goes back."""
MOST_DISAGREEMENT: Final = 0.15
"""Of a frame's side; a neighbour that puts a field further away than that from where the surest does is not heard."""
VIEWS_DECODED: Final = 48

FIELDS_REMEMBERED: Final = 4096
"""The newest ones, some 12 kB each, so that an agent that counts for ever does not need ever more memory; more than ten
smears have. Of older ones only what their cells count for stays: who comes back to their place counts it anew."""
SEARCH_SIDE_PX: Final = 32
SEARCH_BLOCK: Final = 256
"""Fields that are looked at together when a field is lost; 3 MB for as long as it takes, a few us a field."""
SEARCH_BEST: Final = 4
JOIN_TRIES: Final = 2
"""Look-alikes in other parts that a field is compared with: each costs as much as the field before."""
JOIN_WITHIN_PX: Final = 12.0
"""px by which two fields may differ on where another part lies."""
JOIN_NEW_SHARE: Final = 0.1
"""Of a field's area; one that shows less new of its own part is not asked whether it lies in another one too."""

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


@dataclass(frozen=True, slots=True)
class Join:
    """Another part that a field shows to be one with its own. shift: from that part's pixels to those of its own."""

    part: int
    shift: Shift


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """Where a field lies, and the fields around it with the shift to each. shown: how many of these its picture shows.

    join: with this field two parts are one. hint: they may be; the next field may say the same.
    """

    place: Place
    neighbours: list[tuple[Trace, Shift]]
    shown: int = 0
    join: Join | None = None
    hint: Join | None = None


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
    join: Join | None = None
    hint: Join | None = None


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
        self._fields_of_part: Counter[int] = Counter()
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
        boxes = _boxes(cells)
        located = self._locate(view, frame, boxes)
        matches = self._match(boxes, size_px, located.neighbours)
        stuck = self._find_stuck(view, boxes, located.place)
        is_elsewhere = _goes_on_elsewhere(boxes, located.neighbours)
        observation = self._settle(cells, boxes, size_px, view, located, matches, is_elsewhere, stuck)
        return replace(observation, new_share=_new_share(size_px, located.neighbours))

    def _settle(
        self,
        cells: Sequence[Cell],
        boxes: Boxes,
        size_px: tuple[int, int],
        view: View,
        located: Located,
        matches: Sequence[tuple[int, ...]],
        is_elsewhere: NDArray[np.bool_],
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
            counted = sorted((other for other in seen if self._stands[other]), key=lambda other: -self._merit[other])
            root = counted[0] if counted else min(seen, default=number)
            may_count = may_count and (bool(seen) or not is_elsewhere[index])
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
            elif seen:
                first = self._stands[root] if counted else root
                # Cells that were counted apart until this view showed that they are one.
                surplus = [] if not claimed.isdisjoint(seen) else counted[1:]
                surplus = [other for other in surplus if not math.isinf(self._merit[other])]
                for other in surplus:
                    added[self._name_of(other)] -= 1
                old = tuple(self._cell_id(self._stands[other]) for other in surplus)
                cell = replace(
                    cell,
                    status=CellStatus.DUPLICATE,
                    duplicate_of=self._cell_id(first),
                    is_counted=False,
                    supersedes=old,
                )
            else:
                cell = replace(cell, is_counted=False)
            if claimed.isdisjoint(seen) and cell.status is not CellStatus.ARTEFACT:
                held = [other for other in counted[1:] if math.isinf(self._merit[other])]
                merged += [(root, other) for other in seen if other != root and other not in held]
            claimed.update(seen)
            settled.append(cell)
            roots.append(root)
            standing.append(stands)
            names.append(name)
            merits.append(round(merit, 3))
        trace = Trace(
            located.place,
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
            located.join,
            located.hint,
        )
        return Observation(
            tuple(settled),
            MappingProxyType({name: count for name, count in sorted(added.items()) if count}),
            sum(cell.status is CellStatus.DUPLICATE for cell in settled),
            1.0,
            located.place,
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
        if trace.join is not None:
            self._move_part(trace.join, trace.place.part)
        if self._fields and self._last.place.part == trace.place.part and trace.place.source != "stage":
            step = trace.place.shift.then(self._last.place.shift.inverse())
            self._steps = [step, *(old for old in self._steps if math.hypot(old.x - step.x, old.y - step.y) > 40)]
            del self._steps[STEPS_REMEMBERED:]
        self._fields[field] = trace
        self._fields_of_part[trace.place.part] += 1
        self._count += 1
        self._parts = max(self._parts, trace.place.part + 1)
        self._grid.setdefault(self._square(trace.place, trace.size_px), []).append(field)
        self._remember_search(field)
        self._forget(field - FIELDS_REMEMBERED)

    @property
    def _last(self) -> Trace:
        return self._fields[self._count - 1]

    def _move_part(self, join: Join, part: int) -> None:
        """Let the fields of a part lie in another one from now on."""
        for field, trace in self._fields.items():
            if trace.place.part == join.part:
                self._leave_grid(field, trace)
                place = replace(trace.place, part=part, shift=trace.place.shift.then(join.shift))
                self._fields[field] = replace(trace, place=place)
                self._grid.setdefault(self._square(place, trace.size_px), []).append(field)
        self._fields_of_part[part] += self._fields_of_part.pop(join.part, 0)

    def _forget(self, field: int) -> None:
        """No longer look for this field, nor match with its boxes; what its cells count for stays."""
        trace = self._fields.pop(field, None)
        if trace is not None:
            self._leave_grid(field, trace)
            self._fields_of_part[trace.place.part] -= 1
            self._views.pop(field, None)

    def _leave_grid(self, field: int, trace: Trace) -> None:
        square = self._square(trace.place, trace.size_px)
        self._grid[square].remove(field)
        if not self._grid[square]:
            del self._grid[square]

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
        """Whether the frame's picture is found nowhere on this slide, and there is something to compare it with.

        A stage tells where the frame lies and nothing of which slide lies there: what it tells is only looked at first.
        """
        if not self._fields:
            return False
        view, none, size_px = take_view(frame.pixels_bgr), _boxes(()), (frame.width_px, frame.height_px)
        told = _told_place(frame)
        if told is not None and self._measure(view, none, told, size_px, {}):
            return False
        return self._anchor(view, none, size_px) is None

    def _locate(self, view: View, frame: Frame, boxes: Boxes) -> Located:
        size_px = (frame.width_px, frame.height_px)
        told = _told_place(frame)
        if told is not None:
            return Located(told, self._around(told, size_px, self._measure(view, boxes, told, size_px, {})))
        anchor = self._anchor(view, boxes, size_px)
        if anchor is None:
            return Located(Place("unknown", self._parts, Shift(0.0, 0.0)), [])
        located = self._locate_by(anchor, view, boxes, size_px)
        is_asked = _new_share(size_px, located.neighbours) >= JOIN_NEW_SHARE
        return self._join(located, view, boxes, size_px) if is_asked else located

    def _locate_by(self, anchor: tuple[int, Shift], view: View, boxes: Boxes, size_px: tuple[int, int]) -> Located:
        """Where a field lies that was registered to another one: by all fields around it."""
        place = self._place_by([anchor], size_px)
        measured = self._measure(view, boxes, place, size_px, dict([anchor]))
        place = self._place_by(list(measured.items()), size_px)
        return Located(place, self._around(place, size_px, measured), len(measured))

    def _join(self, located: Located, view: View, boxes: Boxes, size_px: tuple[int, int]) -> Located:
        """Where a field lies if it shows a place of another part too: both parts are one then, with the older's pixels.

        Only where the cells agree as well, and two fields say so, of the other part or of this one: a part at the wrong
        place is worse than two parts.
        """
        own = located.place
        others = {part for part, fields in self._fields_of_part.items() if fields} - {own.part, STAGE_PART}
        if not others:
            return located
        for field in self._look_alikes(view, others)[:JOIN_TRIES]:
            shift = register(view, self._view(field), witness=_only_sure(self._witness(boxes, size_px, field)))
            if shift is None:
                continue
            beside = self._locate_by((field, shift), view, boxes, size_px)
            hint = Join(beside.place.part, beside.place.shift.inverse().then(own.shift))
            if beside.shown < 2 and not self._said_before(hint, beside.place):
                return replace(located, hint=hint)
            kept, moved = sorted((own, beside.place), key=lambda place: place.part)
            join = Join(moved.part, moved.shift.inverse().then(kept.shift))
            return replace(located, place=kept, neighbours=[*located.neighbours, *beside.neighbours], join=join)
        return located

    def _said_before(self, hint: Join, place: Place) -> bool:
        """Whether one of the last fields has put the other part at the same place. place: of the field in that part."""
        here = hint.shift.apply(place.shift.x, place.shift.y)
        for field in range(self._count - 1, max(-1, self._count - 1 - RECENT), -1):
            trace = self._fields[field]
            if trace.hint is not None and trace.hint.part == hint.part and trace.place.part == self._last.place.part:
                there = trace.hint.shift.apply(place.shift.x, place.shift.y)
                if math.dist(here, there) <= JOIN_WITHIN_PX:
                    return True
        return False

    def _place_by(self, measured: Sequence[tuple[int, Shift]], size_px: tuple[int, int]) -> Place:
        """Where a field lies by the fields that it was registered to, the first of which is the surest.

        Each says where the field's middle is and how it is turned; what they have in common with it is their weight.
        So the small errors of a long row of fields do not add up where rows lie side by side.
        """
        part = self._fields[measured[0][0]].place.part
        middle = (size_px[0] / 2, size_px[1] / 2)
        said = []
        for field, shift in measured:
            place = shift.then(self._fields[field].place.shift)
            said.append((*place.apply(*middle), place.turn, 0.05 + _shared(shift, size_px)))
        votes = np.asarray(said)
        near = np.hypot(*(votes[:, :2] - votes[0, :2]).T) < MOST_DISAGREEMENT * max(size_px)
        x, y, turn = np.average(votes[near, :3], axis=0, weights=votes[near, 3])
        at_x, at_y = Shift(0.0, 0.0, float(turn)).apply(*middle)
        agreement = measured[0][1].agreement
        return Place("registered", part, Shift(float(x) - at_x, float(y) - at_y, float(turn), agreement))

    def _anchor(self, view: View, boxes: Boxes, size_px: tuple[int, int]) -> tuple[int, Shift] | None:
        """A field that this one overlaps with certainty, and the shift to it: the last one, those around it, any."""
        if not self._fields:
            return None
        last = self._count - 1
        steps = (*self._steps, *(step.inverse() for step in self._steps))
        shift = register(view, self._view(last), steps, witness=self._witness(boxes, size_px, last))
        if shift is not None:
            return last, shift
        if (reckoned := self._reckon(view, boxes, size_px, steps)) is not None:
            return reckoned
        place = self._fields[last].place
        recent = [field for field in range(last - 1, last - 1 - RECENT, -1) if field in self._fields]
        nearest = [field for field in self._near(place, size_px, 1.5) if field != last][:3]
        for field in dict.fromkeys((*recent, *nearest, *self._look_alikes(view))):
            proposals = steps if field in recent else ()
            # Of many that are tried one may fit by chance: cells, where there are some, must agree.
            witness = self._witness(boxes, size_px, field)
            witness = witness if len(boxes) < WITNESSES else _only_sure(witness)
            shift = register(view, self._view(field), proposals, witness=witness)
            if shift is not None:
                return field, shift
        return None

    def _reckon(
        self, view: View, boxes: Boxes, size_px: tuple[int, int], steps: Iterable[Shift]
    ) -> tuple[int, Shift] | None:
        """A neighbour that the field has if the stage went one of its usual steps, and the shift to it.

        So a strip in which too little lies does not lose the row beside, with which the field shares another strip.
        Proposals are many here, so one neighbour is enough only where the cells agree.
        """
        at = self._last.place
        for step in steps:
            guess = Place("registered", at.part, step.then(at.shift))
            measured = self._measure(view, boxes, guess, size_px, {}, searches=False)
            sure = {f: s for f, s in measured.items() if len(measured) > 1 or self._witness(boxes, size_px, f)(s)}
            if sure:
                return max(sure.items(), key=lambda found: found[1].agreement)
        return None

    def _witness(self, boxes: Boxes, size_px: tuple[int, int], field: int) -> Witness:
        old = self._fields[field]
        return lambda shift: boxes_agree(boxes, size_px, old.boxes, old.size_px, shift)

    def _measure(
        self,
        view: View,
        boxes: Boxes,
        place: Place,
        size_px: tuple[int, int],
        known: Mapping[int, Shift],
        *,
        searches: bool = True,
    ) -> dict[int, Shift]:
        """Of the fields around a place those to which the pictures show the shift, with it."""
        measured = dict(known)
        for field in self._near(place, size_px, 1.0):
            if field in known:
                continue
            guess = place.shift.then(self._fields[field].place.shift.inverse())
            # The guess may be off by the stage's slack or the errors of a long way: then the pictures are searched.
            wide = _shared(guess, size_px) > 0.12
            witness = self._witness(boxes, size_px, field)
            shift = register(view, self._view(field), (guess,), searches=searches and wide, witness=witness)
            if shift is not None:
                measured[field] = shift
        return measured

    def _around(
        self, place: Place, size_px: tuple[int, int], measured: Mapping[int, Shift]
    ) -> list[tuple[Trace, Shift]]:
        """The fields that overlap a place, with the shift to each: measured, else as the map has it."""
        fields = dict.fromkeys((*measured, *self._near(place, size_px, 1.0)))
        return [
            (
                self._fields[field],
                measured.get(field) or place.shift.then(self._fields[field].place.shift.inverse()),
            )
            for field in fields
        ]

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

    def _look_alikes(self, view: View, parts: Container[int] | None = None) -> list[int]:
        """Fields whose small pictures correlate best with this one at any shift, SEARCH_BEST at most.

        parts: in which they are looked for; None = in all.
        """
        wanted = _search_spectrum(view).conj()
        tops = np.concatenate(
            [np.fft.irfft2(block * wanted, (SEARCH_SIDE_PX, SEARCH_SIDE_PX)).max(axis=(1, 2)) for block in self._search]
        )[: len(self._fields)]
        # The place of a field in the blocks comes again with each FIELDS_REMEMBERED fields.
        oldest = self._count - len(self._fields)
        fields = (oldest + (int(place) - oldest) % FIELDS_REMEMBERED for place in np.argsort(tops)[::-1])
        alike = (field for field in fields if parts is None or self._fields[field].place.part in parts)
        return list(islice(alike, SEARCH_BEST))

    def _remember_search(self, field: int) -> None:
        block, place = divmod(field % FIELDS_REMEMBERED, SEARCH_BLOCK)
        if block == len(self._search):
            self._search.append(np.zeros((SEARCH_BLOCK, SEARCH_SIDE_PX, SEARCH_SIDE_PX // 2 + 1), np.complex64))
        self._search[block][place] = _search_spectrum(self._view(field))

    # ---- the cells

    def _match(
        self, boxes: Boxes, size_px: tuple[int, int], neighbours: Sequence[tuple[Trace, Shift]]
    ) -> list[tuple[int, ...]]:
        """For each box the roots of the cells that it shows again."""
        roots: list[dict[int, None]] = [{} for _ in boxes]
        for trace, shift in neighbours:
            for new, old in match_boxes(boxes, size_px, trace.boxes, trace.size_px, shift):
                root = self._find_root(trace.numbers[old])
                if not any(self._are_apart(root, other, neighbours) for other in roots[new]):
                    roots[new][root] = None
        return [tuple(found) for found in roots]

    def _are_apart(self, root: int, other: int, neighbours: Iterable[tuple[Trace, Shift]]) -> bool:
        """Whether a field shows both, so that they are two cells."""
        both = {root, other}
        return root != other and any(
            both <= {self._find_root(number) for number in trace.numbers} for trace, _ in neighbours
        )

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


def _only_sure(witness: Witness) -> Witness:
    """One that is against what it cannot tell."""
    return lambda shift: witness(shift) is True


def _told_place(frame: Frame) -> Place | None:
    """Where the stage says that a frame lies."""
    if frame.stage_um is None or frame.um_per_px is None:
        return None
    x, y = (um / frame.um_per_px for um in frame.stage_um)
    return Place("stage", STAGE_PART, Shift(x, y))


# ------------------------------------------------------------------------------------------------------ the boxes


def match_boxes(
    new: Boxes, new_size_px: tuple[int, int], old: Boxes, old_size_px: tuple[int, int], shift: Shift
) -> list[tuple[int, int]]:
    """Pairs (new, old) that show one cell: at the same place within what both fields show; each box once."""
    if not len(new) or not len(old):
        return []
    moved = _moved(old, shift.inverse())
    region = _common(new_size_px, old_size_px, shift)
    if region is None:
        return []
    a, b = _cut(new, *region), _cut(moved, *region)
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
    is_thin_a, is_thin_b = (_thickness(boxes) < LEAST_SEEN_PX for boxes in (a, b))
    score = np.where(is_thin_a[:, None] | is_thin_b[None], 0, score)
    # A sliver at an edge: what of the other box lies within a pixel or two of it, beside it, is the same cell.
    wide_a, wide_b = (_cut(boxes + SLACK_PX, *region) for boxes in (new, moved))
    for is_sliver, within in (
        ((is_thin_a & is_cut_a)[:, None], _inside(a, wide_b)),
        ((is_thin_b & is_cut_b)[None], _inside(b, wide_a).T),
    ):
        score = np.where(is_sliver & (within >= SAME_CUT), np.maximum(score, 0.1 * within), score)
    is_there = _reaches(new, region)[:, None] & _reaches(moved, region)[None]
    is_one = _sides_agree(new, _shown(new, new_size_px), moved, _shown(old, old_size_px), region)
    score = np.where(is_there & is_one, score, 0)
    pairs: list[tuple[int, int]] = []
    while True:
        index = int(score.argmax())
        row, column = divmod(index, score.shape[1])
        if score[row, column] <= 0:
            return pairs
        pairs.append((row, column))
        score[row], score[:, column] = 0, 0


def _sides_agree(
    new: Boxes,
    shown_new: NDArray[np.bool_],
    old: Boxes,
    shown_old: NDArray[np.bool_],
    region: tuple[float, float, float, float],
) -> NDArray[np.bool_]:
    """Of each pair whether the sides that both fields show lie at one place: (n, m). Both in the new frame.

    Only along an axis on which the region cuts one of the two: there the corner of one cell may lie within another one,
    and yet they end elsewhere. Across that axis a sliver's box does not tell where its cell ends.
    """
    agree = np.ones((len(new), len(old)), bool)
    for low, high in ((0, 2), (1, 3)):
        cut_new, cut_old = (
            (boxes[:, low] < region[low] + EDGE_PX) | (boxes[:, high] > region[high] - EDGE_PX) for boxes in (new, old)
        )
        shorter = np.minimum((new[:, high] - new[:, low])[:, None], (old[:, high] - old[:, low])[None])
        for side in (low, high):
            is_told = (cut_new[:, None] | cut_old[None]) & shown_new[:, side][:, None] & shown_old[:, side][None]
            away = np.abs(new[:, side][:, None] - old[:, side][None])
            agree &= ~is_told | (away <= np.maximum(SIDE_PX, SIDE_SHARE * shorter))
    return agree


def _shown(boxes: Boxes, size_px: tuple[int, int]) -> NDArray[np.bool_]:
    """Of each box which sides are its cell's, (n, 4): not cut by the frame's edge, which a cut box hardly misses."""
    return np.asarray((boxes > SIDE_PX) & (boxes < np.asarray(size_px * 2) - SIDE_PX))


def boxes_agree(
    new: Boxes, new_size_px: tuple[int, int], old: Boxes, old_size_px: tuple[int, int], shift: Shift
) -> bool | None:
    """Whether the cells that two fields should have in common are there; None where they are too few to say.

    In a narrow strip most of them are cut by an edge: compared is what of each lies in the strip.
    """
    if not len(new) or not len(old):
        return None
    region = _common(new_size_px, old_size_px, shift)
    if region is None:
        return None
    a, b = (_seen_in(boxes, region) for boxes in (new, _moved(old, shift.inverse())))
    fewer = min(len(a), len(b))
    if fewer < WITNESSES:
        return None
    overlap = _overlaps(a, b)
    met = min(int((overlap.max(axis=axis) >= SAME_PIECE).sum()) for axis in (0, 1))
    if met >= max(WITNESSES, 0.6 * fewer):
        return True
    return False if met < 0.25 * fewer else None


def _common(
    new_size_px: tuple[int, int], old_size_px: tuple[int, int], shift: Shift
) -> tuple[float, float, float, float] | None:
    """left, top, right, bottom in the new frame of what both show; None where that is nearly nothing."""
    width, height = old_size_px
    corners = shift.inverse().apply_all(np.asarray([[0, 0], [width, 0], [0, height], [width, height]], float))
    left, top = (max(0.0, float(np.sort(corners[:, axis])[1])) for axis in (0, 1))
    right, bottom = (min(float(new_size_px[axis]), float(np.sort(corners[:, axis])[2])) for axis in (0, 1))
    return None if min(right - left, bottom - top) < LEAST_SEEN_PX else (left, top, right, bottom)


def _seen_in(boxes: Boxes, region: tuple[float, float, float, float]) -> Boxes:
    """What of the boxes lies in a region, without those of which nearly nothing does."""
    cut = _cut(boxes, *region)
    return cut[_thickness(cut) >= LEAST_SEEN_PX]


def _overlaps(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """Intersection over union of each with each: (len(a), len(b))."""
    width = np.minimum(a[:, None, 2], b[None, :, 2]) - np.maximum(a[:, None, 0], b[None, :, 0])
    height = np.minimum(a[:, None, 3], b[None, :, 3]) - np.maximum(a[:, None, 1], b[None, :, 1])
    both = np.clip(width, 0, None) * np.clip(height, 0, None)
    return np.asarray(both / np.maximum(_area(a)[:, None] + _area(b)[None] - both, 1e-6))


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


def _thickness(boxes: Boxes) -> NDArray[np.float64]:
    return np.asarray(np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]))


def _reaches(boxes: Boxes, region: tuple[float, float, float, float]) -> NDArray[np.bool_]:
    """Whether boxes come to a region, but for the slack."""
    wide = boxes + SLACK_PX
    return np.asarray(((wide[:, :2] <= region[2:]) & (wide[:, 2:] >= region[:2])).all(axis=1))


def _inside(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """Share of each of a that lies in each of b, also where a has no width or no height: (len(a), len(b))."""
    share = np.ones((len(a), len(b)))
    for low, high in ((0, 2), (1, 3)):
        length = np.maximum(a[:, None, high] - a[:, None, low], 1e-6)
        both = np.minimum(a[:, None, high], b[None, :, high]) - np.maximum(a[:, None, low], b[None, :, low])
        share *= np.clip(np.where(length > 1e-5, both / length, both >= 0), 0, 1)
    return share


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


def _goes_on_elsewhere(boxes: Boxes, neighbours: Sequence[tuple[Trace, Shift]]) -> NDArray[np.bool_]:
    """Of each box whether the left or the upper edge cuts it where another field shows more of the cell: (n,)."""
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    beyond = CUT_BEYOND * (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    is_elsewhere = np.zeros(len(boxes), bool)
    for axis in (0, 1):
        points = middles.copy()
        points[:, axis] = -beyond
        is_cut = boxes[:, axis] < EDGE_PX
        for trace, shift in neighbours:
            there = shift.apply_all(points)
            is_elsewhere |= is_cut & ((there >= 0) & (there < trace.size_px)).all(axis=1)
    return is_elsewhere


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
    return json.dumps(
        {
            "place": [trace.place.source, trace.place.part, *_shift_values(trace.place.shift)],
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
            "join": _join_values(trace.join),
            "hint": _join_values(trace.hint),
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
            _join_of(stored.get("join")),
            _join_of(stored.get("hint")),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the trace of a field: {error}") from error


def _shift_values(shift: Shift) -> tuple[float, float, float, float]:
    return shift.x, shift.y, shift.turn, shift.agreement


def _join_values(join: Join | None) -> list[float] | None:
    return None if join is None else [join.part, *_shift_values(join.shift)]


def _join_of(values: Sequence[float] | None) -> Join | None:
    """None too where a version before this one has written the trace."""
    return None if values is None else Join(int(values[0]), Shift(*values[1:]))


def map_from_traces(sid: str, texts: Iterable[str]) -> SlideMap:
    """The map of a slide as it was after the last stored field."""
    slide = SlideMap(sid)
    for text in texts:
        slide.add(trace_from_text(text))
    return slide
