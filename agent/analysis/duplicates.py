"""Each cell of a slide counted once, while its fields come one after another and overlap.

    SlideMap.observe(frame, cells) --> Observation: the cells with their standing, what the field adds to the slide, and
    its Trace            SlideMap.add(trace): only when the field is stored; from the traces the map can be made again

Where a field lies: `agent.analysis.placing`. Which boxes of two fields show one cell: `agent.analysis.field_boxes`.

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

Pure; memory is bounded by the fields that `agent.analysis.placing` remembers and the cells that they show. Each trace
says what the map knew of its cells before, so that the map is made again from the traces of these fields alone.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.analysis.cells import EDGE_PX, UNIDENTIFIED, cell_number
from agent.analysis.field_boxes import Boxes, boxes_of, is_whole, match_boxes, may_count
from agent.analysis.placing import Located, Places, new_share
from agent.analysis.registration import Shift, View, take_view, to_jpeg
from agent.analysis.traces import Before, Place, Standing, Trace, trace_from_text
from agent.domain import Cell, CellStatus, Frame

BETTER_BY: Final = 0.2
"""Probability by which a later view must be surer to take the standing one's place: so that names do not flicker."""

CUT_BEYOND: Final = 0.3
"""Of a box's longer side: a field that shows so much more of a cut cell, beyond the edge, decides whether it is one."""

DIRT_APPEARANCES: Final = 3
"""In a row. One cell in 500 lies on the pixels of one of the field before by chance; most of these look otherwise."""
DIRT_SHARE: Final = 0.12
"""Of its size, by which dirt may seem to move and to change between two fields: the detector's own unrest."""
DIRT_LOOK: Final = 0.8
"""Normalised correlation of its pixels in two fields. White cells that a microscope brings to the middle of each field
reach 0.7, so where the slide is not known to have moved nothing is called dirt."""


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
        self.places = Places()
        # By root, the number of a cell's first view: what stands for the cell.
        self._standing: dict[int, Standing] = {}
        # Roots that were found to be another one's cell, and that one.
        self._merged: dict[int, int] = {}

    # ---- looking

    def observe(self, frame: Frame, cells: Sequence[Cell]) -> Observation:
        """The field's cells, each new, seen before, or dirt; nothing of it is remembered until `add`."""
        view = take_view(frame.pixels_bgr)
        size_px = (frame.width_px, frame.height_px)
        boxes = boxes_of(cells)
        located = self.places.locate(view, frame, boxes)
        matches = self._match(boxes, size_px, located.neighbours)
        stuck = self._find_stuck(view, boxes, located.place)
        is_elsewhere = _goes_on_elsewhere(boxes, located.neighbours)
        observation = self._settle(cells, boxes, size_px, view, located, matches, is_elsewhere, stuck)
        return replace(observation, new_share=new_share(size_px, located.neighbours))

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
        # Dirt first: what is taken back is no cell that another box of this field could show again.
        taken_back_by: dict[int, list[int]] = {}
        for index, views in enumerate(stuck):
            if len(views) + 1 >= DIRT_APPEARANCES:
                taken_back_by[index] = self._to_take_back(views, withdrawn)
                withdrawn += taken_back_by[index]
        for index, cell in enumerate(cells):
            number, name = cell_number(cell.cell_id), _count_key(cell)
            is_named = cell.status is not CellStatus.UNIDENTIFIED
            merit = 4.0 * is_whole(boxes[index], size_px) + 2.0 * is_named + cell.probability
            seen = tuple(root for root in matches[index] if root not in withdrawn)
            counted = sorted((other for other in seen if other in self._standing), key=lambda one: -self._merit(one))
            root = counted[0] if counted else min(seen, default=number)
            counts = may_count(boxes[index], size_px) and (bool(seen) or not is_elsewhere[index])
            stands = False
            if index in taken_back_by:
                for other in taken_back_by[index]:
                    added[self._name_of(other)] -= 1
                old = tuple(self._cell_id(self._view(other)) for other in taken_back_by[index])
                cell = replace(cell, status=CellStatus.ARTEFACT, is_counted=False, supersedes=old)
                root = number
            elif not counted and counts and root not in claimed:
                added[name] += 1
                stands = True
                cell = replace(cell, is_counted=True)
            elif (
                counted
                and counts
                and merit > max(self._merit(other) for other in counted) + BETTER_BY
                and claimed.isdisjoint(seen)
            ):
                added[name] += 1
                for other in counted:
                    added[self._name_of(other)] -= 1
                stands = True
                old = tuple(self._cell_id(self._view(other)) for other in counted)
                cell = replace(cell, is_counted=True, supersedes=old)
            elif seen:
                first = self._view(root) if counted else root
                # Cells that were counted apart until this view showed that they are one.
                surplus = [] if not claimed.isdisjoint(seen) else counted[1:]
                surplus = [other for other in surplus if not math.isinf(self._merit(other))]
                for other in surplus:
                    added[self._name_of(other)] -= 1
                old = tuple(self._cell_id(self._view(other)) for other in surplus)
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
                held = [other for other in counted[1:] if math.isinf(self._merit(other))]
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
        trace = replace(trace, before=self.before(trace))
        return Observation(
            tuple(settled),
            MappingProxyType({name: count for name, count in sorted(added.items()) if count}),
            sum(cell.status is CellStatus.DUPLICATE for cell in settled),
            1.0,
            located.place,
            trace,
        )

    # ---- remembering

    def hold(self, *cell_ids: str) -> None:
        """A person has named these cells: no later view takes their place, and they are not taken back as dirt."""
        numbers = {cell_number(cell_id) for cell_id in cell_ids}
        for root, one in self._standing.items():
            if one.number in numbers:
                self._standing[root] = replace(one, merit=math.inf)

    def before(self, trace: Trace) -> Before:
        """What the trace of the next field keeps of the map as it is."""
        views = (self._root_of_view(number) for numbers in trace.stuck for number in numbers)
        shown = dict.fromkeys((*trace.roots, *(other for _, other in trace.merged), *trace.withdrawn, *views))
        return self.places.before(self._standing[root] for root in shown if root in self._standing)

    def add(self, trace: Trace, *, is_seen: bool = True) -> None:
        """Take a stored field into the map. is_seen: as in `Places.add`."""
        forgotten = self.places.add(trace, is_seen=is_seen)
        field = self.places.count - 1
        for one in () if trace.before is None else trace.before.standing:
            known = self._standing.get(one.root)
            self._standing[one.root] = replace(one, last_field=field if known is None else known.last_field)
        for number, root, stands, name, merit in zip(
            trace.numbers, trace.roots, trace.is_standing, trace.names, trace.merits, strict=True
        ):
            if stands:
                self._standing[root] = Standing(root, number, sys.intern(name), merit, field)
            elif root in self._standing:
                self._standing[root] = replace(self._standing[root], last_field=field)
        for root, other in trace.merged:
            self._merged[other] = root
            self._standing.pop(other, None)
        for root in trace.withdrawn:
            self._standing.pop(root, None)
        if forgotten is not None:
            self._forget(forgotten, field)

    def _forget(self, trace: Trace, newest: int) -> None:
        """Of the cells that a trace showed, those that no remembered field shows. newest: number of the last field."""
        oldest = newest + 1 - len(self.places.fields)
        for root in {self._find_root(root) for root in trace.roots}:
            if root in self._standing and self._standing[root].last_field < oldest:
                del self._standing[root]
        for _, other in trace.merged:
            self._merged.pop(other, None)  # the fields after it name the other root

    def _find_root(self, root: int) -> int:
        while root in self._merged:
            root = self._merged[root]
        return root

    def _root_of_view(self, number: int) -> int:
        """The root of a view in one of the last fields."""
        for field in range(self.places.count - 1, max(-1, self.places.count - 1 - DIRT_APPEARANCES), -1):
            trace = self.places.fields.get(field)
            if trace is not None and number in trace.numbers:
                return self._find_root(trace.roots[trace.numbers.index(number)])
        return number

    def _view(self, root: int) -> int:
        return self._standing[root].number

    def _merit(self, root: int) -> float:
        return self._standing[root].merit

    def _name_of(self, root: int) -> str:
        return self._standing[root].name

    def _cell_id(self, number: int) -> str:
        return f"{self.sid}-{number}"

    # ---- the cells

    def _match(
        self, boxes: Boxes, size_px: tuple[int, int], neighbours: Sequence[tuple[Trace, Shift]]
    ) -> list[tuple[int, ...]]:
        """For each box the roots of the cells that it shows again."""
        roots: list[dict[int, None]] = [{} for _ in boxes]
        for trace, shift in neighbours:
            for new, old in match_boxes(boxes, size_px, trace.boxes, trace.size_px, shift):
                root = self._find_root(trace.roots[old])
                if not any(self._are_apart(root, other, neighbours) for other in roots[new]):
                    roots[new][root] = None
        return [tuple(found) for found in roots]

    def _are_apart(self, root: int, other: int, neighbours: Iterable[tuple[Trace, Shift]]) -> bool:
        """Whether a field shows both, so that they are two cells."""
        both = {root, other}
        return root != other and any(both <= {self._find_root(one) for one in trace.roots} for trace, _ in neighbours)

    # ---- dirt

    def _to_take_back(self, views: Iterable[int], withdrawn: Collection[int]) -> list[int]:
        """The roots of dirt's views that count, but for those withdrawn already and what a person has named."""
        roots = dict.fromkeys(self._root_of_view(number) for number in views)
        return [
            root
            for root in roots
            if root in self._standing and root not in withdrawn and not math.isinf(self._merit(root))
        ]

    def _find_stuck(self, view: View, boxes: Boxes, place: Place) -> list[tuple[int, ...]]:
        """For each box the numbers of the views before it, in a row, that lay on its pixels and looked like it."""
        if not self.places.has_moved(place):
            return [() for _ in boxes]
        last, before = self.places.last, self.places.view(self.places.count - 1)
        found: list[tuple[int, ...]] = []
        for box in boxes:
            index = _same_pixels(box, last.boxes)
            if index is None or not _looks_alike(view, before, box):
                found.append(())
            else:
                found.append((*last.stuck[index], last.numbers[index])[-DIRT_APPEARANCES:])
        return found


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


def _count_key(cell: Cell) -> str:
    return UNIDENTIFIED if cell.status is CellStatus.UNIDENTIFIED else cell.class_name


def map_from_traces(sid: str, texts: Iterable[str]) -> SlideMap:
    """The map of a slide as it was after the last stored field."""
    slide = SlideMap(sid)
    for text in texts:
        slide.add(trace_from_text(text), is_seen=False)
    slide.places.see()
    return slide
