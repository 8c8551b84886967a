"""Where each field of a slide lies, and which fields lie around it.

    Places.locate(view, frame, boxes) --> Located          Places.add(trace): only when the field is stored

From the stage, where the camera tells it; else by registering the field to those before it and around it
(`agent.analysis.registration`); else its place is unknown, and it begins a part of the slide of its own. Two parts of
which one field shows a place each are one from then on.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.analysis.field_boxes import WITNESSES, Boxes, boxes_agree, boxes_of
from agent.analysis.registration import Shift, View, Witness, from_jpeg, register, take_view
from agent.analysis.traces import Before, Join, Place, Standing, Trace
from agent.domain import Frame

STAGE_PART: Final = 0
NEIGHBOURS: Final = 8
STEPS_REMEMBERED: Final = 3
RECENT: Final = 3
"""Fields before the last one that a lost field is compared with first: who looks at a place again mostly goes back."""
MOST_DISAGREEMENT: Final = 0.15
"""Of a frame's side; a neighbour that puts a field further away than that from where the surest does is not heard."""
VIEWS_DECODED: Final = 48

FIELDS_REMEMBERED: Final = 4096
"""The newest ones, some 15 kB each, so that an agent that counts for ever needs neither ever more memory nor ever more
disk; more than ten smears have. Of older ones stays what their cells count for: who comes back to their place counts it
anew."""
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

RASTER: Final = 24
"""Points a side at which a field is asked whether another one shows this place too."""


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


class Places:
    """The fields of one slide by their number, 0 the first; the newest FIELDS_REMEMBERED of them are remembered."""

    def __init__(self) -> None:
        self.fields: dict[int, Trace] = {}
        self.count = 0
        self._grid: dict[tuple[int, int, int], list[int]] = {}
        self._parts = 1
        self._fields_of_part: Counter[int] = Counter()
        self._views: OrderedDict[int, View] = OrderedDict()
        self._steps: list[Shift] = []
        # Of field n its spectrum stands in place n % FIELDS_REMEMBERED, counted through the blocks.
        self._search: list[NDArray[np.complex64]] = []

    def add(self, trace: Trace, *, is_seen: bool = True) -> Trace | None:
        """Remember a stored field; returns the one that is forgotten for it.

        is_seen: False = it need not be found by its picture yet; `see` makes up for it.
        """
        if trace.before is not None:  # says what is known already, except to a map that is made again
            self.count = self.count if self.fields else trace.before.fields
            self._parts, self._steps = trace.before.parts, list(trace.before.steps)
        field = self.count
        if trace.join is not None:
            self._move_part(trace.join, trace.place.part)
        if self.fields and self.last.place.part == trace.place.part and trace.place.source != "stage":
            step = trace.place.shift.then(self.last.place.shift.inverse())
            self._steps = [step, *(old for old in self._steps if math.hypot(old.x - step.x, old.y - step.y) > 40)]
            del self._steps[STEPS_REMEMBERED:]
        self.fields[field] = replace(trace, before=None)
        self._fields_of_part[trace.place.part] += 1
        self.count += 1
        self._parts = max(self._parts, trace.place.part + 1)
        self._grid.setdefault(self._square(trace.place, trace.size_px), []).append(field)
        if is_seen:
            self._remember_search(field)
        return self._forget(field - FIELDS_REMEMBERED)

    def see(self) -> None:
        """Look at all remembered fields, so that they are found by their pictures."""
        for field in self.fields:
            self._remember_search(field)

    def before(self, standing: Iterable[Standing]) -> Before:
        """What the next field's trace keeps of the map as it is. standing: of the cells that it shows again."""
        return Before(self.count, self._parts, tuple(self._steps), tuple(standing))

    @property
    def last(self) -> Trace:
        """The field before. Raises KeyError where there is none."""
        return self.fields[self.count - 1]

    def locate(self, view: View, frame: Frame, boxes: Boxes) -> Located:
        """Where a field lies; nothing of it is remembered until `add`."""
        size_px = (frame.width_px, frame.height_px)
        told = _told_place(frame)
        if told is not None:
            return Located(told, self._around(told, size_px, self._measure(view, boxes, told, size_px, {})))
        anchor = self._anchor(view, boxes, size_px)
        if anchor is None:
            return Located(Place("unknown", self._parts, Shift(0.0, 0.0)), [])
        return self._join(self._locate_by(anchor, view, boxes, size_px), view, boxes, size_px)

    def is_lost(self, frame: Frame) -> bool:
        """Whether the frame's picture is found nowhere on this slide, and there is something to compare it with.

        A stage tells where the frame lies and nothing of which slide lies there: what it tells is only looked at first.
        """
        if not self.fields:
            return False
        view, none, size_px = take_view(frame.pixels_bgr), boxes_of(()), (frame.width_px, frame.height_px)
        told = _told_place(frame)
        if told is not None and self._measure(view, none, told, size_px, {}):
            return False
        return self._anchor(view, none, size_px) is None

    def has_moved(self, place: Place) -> bool:
        """Whether the slide is known to lie elsewhere than in the field before: no cell is on the same pixel then."""
        if not self.fields or self.last.place.part != place.part:
            return False
        step = place.shift.then(self.last.place.shift.inverse())
        return math.hypot(step.x, step.y) > 0.05 * max(self.last.size_px)

    def view(self, field: int) -> View:
        """How a remembered field looks."""
        view = self._views.get(field)
        if view is None:
            view = self._views[field] = from_jpeg(self.fields[field].picture, self.fields[field].factor)
            if len(self._views) > VIEWS_DECODED:
                self._views.popitem(last=False)
        else:
            self._views.move_to_end(field)
        return view

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
        others = self._fields_of_part.keys() - {own.part, STAGE_PART}
        if not others or new_share(size_px, located.neighbours) < JOIN_NEW_SHARE:
            return located
        for field in self._look_alikes(view, others)[:JOIN_TRIES]:
            shift = register(view, self.view(field), witness=_only_sure(self._witness(boxes, size_px, field)))
            if shift is None:
                continue
            beside = self._locate_by((field, shift), view, boxes, size_px)
            hint = Join(beside.place.part, beside.place.shift.inverse().then(own.shift))
            if beside.shown < 2 and not self._said_before(hint, own.part, beside.place):
                return replace(located, hint=hint)
            kept, moved = sorted((own, beside.place), key=lambda place: place.part)
            join = Join(moved.part, moved.shift.inverse().then(kept.shift))
            return replace(located, place=kept, neighbours=[*located.neighbours, *beside.neighbours], join=join)
        return located

    def _said_before(self, hint: Join, own_part: int, place: Place) -> bool:
        """Whether one of the last fields of this part put the other one there too. place: in that one."""
        here = hint.shift.apply(place.shift.x, place.shift.y)
        for field in range(self.count - 1, max(-1, self.count - 1 - RECENT), -1):
            trace = self.fields[field]
            if trace.hint is not None and trace.hint.part == hint.part and trace.place.part == own_part:
                there = trace.hint.shift.apply(place.shift.x, place.shift.y)
                if math.dist(here, there) <= JOIN_WITHIN_PX:
                    return True
        return False

    def _place_by(self, measured: Sequence[tuple[int, Shift]], size_px: tuple[int, int]) -> Place:
        """Where a field lies by the fields that it was registered to, the first of which is the surest.

        Each says where the field's middle is and how it is turned; what they have in common with it is their weight.
        So the small errors of a long row of fields do not add up where rows lie side by side.
        """
        part = self.fields[measured[0][0]].place.part
        middle = (size_px[0] / 2, size_px[1] / 2)
        said = []
        for field, shift in measured:
            place = shift.then(self.fields[field].place.shift)
            said.append((*place.apply(*middle), place.turn, 0.05 + _shared(shift, size_px)))
        votes = np.asarray(said)
        near = np.hypot(*(votes[:, :2] - votes[0, :2]).T) < MOST_DISAGREEMENT * max(size_px)
        x, y, turn = np.average(votes[near, :3], axis=0, weights=votes[near, 3])
        at_x, at_y = Shift(0.0, 0.0, float(turn)).apply(*middle)
        agreement = measured[0][1].agreement
        return Place("registered", part, Shift(float(x) - at_x, float(y) - at_y, float(turn), agreement))

    def _anchor(self, view: View, boxes: Boxes, size_px: tuple[int, int]) -> tuple[int, Shift] | None:
        """A field that this one overlaps with certainty, and the shift to it: the last one, those around it, any."""
        if not self.fields:
            return None
        last = self.count - 1
        steps = (*self._steps, *(step.inverse() for step in self._steps))
        shift = register(view, self.view(last), steps, witness=self._witness(boxes, size_px, last))
        if shift is not None:
            return last, shift
        if (reckoned := self._reckon(view, boxes, size_px, steps)) is not None:
            return reckoned
        place = self.fields[last].place
        recent = [field for field in range(last - 1, last - 1 - RECENT, -1) if field in self.fields]
        nearest = [field for field in self._near(place, size_px, 1.5) if field != last][:3]
        for field in dict.fromkeys((*recent, *nearest, *self._look_alikes(view))):
            proposals = steps if field in recent else ()
            # Of many that are tried one may fit by chance: cells, where there are some, must agree.
            witness = self._witness(boxes, size_px, field)
            witness = witness if len(boxes) < WITNESSES else _only_sure(witness)
            shift = register(view, self.view(field), proposals, witness=witness)
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
        at = self.last.place
        for step in steps:
            guess = Place("registered", at.part, step.then(at.shift))
            measured = self._measure(view, boxes, guess, size_px, {}, searches=False)
            sure = {f: s for f, s in measured.items() if len(measured) > 1 or self._witness(boxes, size_px, f)(s)}
            if sure:
                return max(sure.items(), key=lambda found: found[1].agreement)
        return None

    def _witness(self, boxes: Boxes, size_px: tuple[int, int], field: int) -> Witness:
        old = self.fields[field]
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
            guess = place.shift.then(self.fields[field].place.shift.inverse())
            # The guess may be off by the stage's slack or the errors of a long way: then the pictures are searched.
            wide = _shared(guess, size_px) > 0.12
            witness = self._witness(boxes, size_px, field)
            shift = register(view, self.view(field), (guess,), searches=searches and wide, witness=witness)
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
                self.fields[field],
                measured.get(field) or place.shift.then(self.fields[field].place.shift.inverse()),
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
            shift = place.shift.then(self.fields[field].place.shift.inverse())
            dx, dy = abs(shift.x) / size_px[0], abs(shift.y) / size_px[1]
            if max(dx, dy) < reach:
                away[field] = dx + dy
        return sorted(away, key=away.__getitem__)[:NEIGHBOURS]

    def _square(self, place: Place, size_px: tuple[int, int]) -> tuple[int, int, int]:
        side = 1.5 * max(size_px)
        return place.part, math.floor(place.shift.x / side), math.floor(place.shift.y / side)

    def _look_alikes(self, view: View, parts: Container[int] | None = None) -> list[int]:
        """Fields whose small pictures correlate best with this one at any shift, SEARCH_BEST at most.

        parts: in which they are looked for; None = in all.
        """
        wanted = _search_spectrum(view).conj()
        tops = np.concatenate(
            [np.fft.irfft2(block * wanted, (SEARCH_SIDE_PX, SEARCH_SIDE_PX)).max(axis=(1, 2)) for block in self._search]
        )[:FIELDS_REMEMBERED]
        # The place of a field in the blocks comes again with each FIELDS_REMEMBERED fields.
        oldest = self.count - len(self.fields)
        fields = (oldest + (int(place) - oldest) % FIELDS_REMEMBERED for place in np.argsort(tops)[::-1])
        known = (field for field in fields if field in self.fields)
        alike = (field for field in known if parts is None or self.fields[field].place.part in parts)
        return list(islice(alike, SEARCH_BEST))

    def _move_part(self, join: Join, part: int) -> None:
        """Let the fields of a part lie in another one from now on."""
        for field, trace in self.fields.items():
            if trace.place.part == join.part:
                self._leave_grid(field, trace)
                place = replace(trace.place, part=part, shift=trace.place.shift.then(join.shift))
                self.fields[field] = replace(trace, place=place)
                self._grid.setdefault(self._square(place, trace.size_px), []).append(field)
        self._fields_of_part[part] += self._fields_of_part.pop(join.part, 0)

    def _forget(self, field: int) -> Trace | None:
        """No longer look for this field, nor match with its boxes; what its cells count for stays."""
        trace = self.fields.pop(field, None)
        if trace is not None:
            self._leave_grid(field, trace)
            self._fields_of_part[trace.place.part] -= 1
            if not self._fields_of_part[trace.place.part]:
                del self._fields_of_part[trace.place.part]
            self._views.pop(field, None)
        return trace

    def _leave_grid(self, field: int, trace: Trace) -> None:
        square = self._square(trace.place, trace.size_px)
        self._grid[square].remove(field)
        if not self._grid[square]:
            del self._grid[square]

    def _remember_search(self, field: int) -> None:
        block, place = divmod(field % FIELDS_REMEMBERED, SEARCH_BLOCK)
        while block >= len(self._search):
            self._search.append(np.zeros((SEARCH_BLOCK, SEARCH_SIDE_PX, SEARCH_SIDE_PX // 2 + 1), np.complex64))
        self._search[block][place] = _search_spectrum(self.view(field))


def _only_sure(witness: Witness) -> Witness:
    """One that is against what it cannot tell."""
    return lambda shift: witness(shift) is True


def _told_place(frame: Frame) -> Place | None:
    """Where the stage says that a frame lies."""
    if frame.stage_um is None or frame.um_per_px is None:
        return None
    x, y = (um / frame.um_per_px for um in frame.stage_um)
    return Place("stage", STAGE_PART, Shift(x, y))


def new_share(size_px: tuple[int, int], neighbours: Iterable[tuple[Trace, Shift]]) -> float:
    """Of a field's area, 0 to 1, what none of these shows."""
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
    height, width = (max(1, round(side / 2)) for side in view.half.shape)
    small = cv2.resize(view.half, (width, height), interpolation=cv2.INTER_AREA)[:SEARCH_SIDE_PX, :SEARCH_SIDE_PX]
    spectrum = np.fft.rfft2(small - small.mean(), (SEARCH_SIDE_PX, SEARCH_SIDE_PX))
    return np.asarray(spectrum / (np.abs(spectrum) + 1e-3), np.complex64)
