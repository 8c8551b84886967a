"""What is kept of a field while its slide is counted: where it lies, how it looks, and which cells it showed."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from agent.analysis.field_boxes import Boxes
from agent.analysis.registration import Shift

Source = Literal["stage", "registered", "unknown"]


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


@dataclass(frozen=True, slots=True)
class Standing:
    """The view that stands for a cell. root: number of the cell's first view. number, name, merit: of this one.

    last_field: number of the newest field that shows the cell; not written down.
    """

    root: int
    number: int
    name: str
    merit: float
    last_field: int = 0


@dataclass(frozen=True, slots=True)
class Before:
    """What the map knew before a field and older ones had told it: with it the map can be made again without those.

    fields, parts: how many there were. steps: from field to field, the newest first. standing: of the cells that the
    field shows again.
    """

    fields: int
    parts: int
    steps: tuple[Shift, ...]
    standing: tuple[Standing, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What the map keeps of one field.

    numbers: of its cells' ids. roots: the number of the first view of each one's cell. is_standing: this view counts.
    merged: pairs of roots, the second of which is the first one's cell. withdrawn: roots that are no cells. stuck: of
    each cell the numbers of the views before that lay on the same pixels. before: None in what a version before this
    one has written, and where the trace is remembered already.
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
    before: Before | None = None


def trace_to_text(trace: Trace) -> str:
    """A trace as one line of JSON, some 6 kB."""
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
            "before": _before_values(trace.before),
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
            _before_of(stored.get("before")),
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


def _before_values(before: Before | None) -> dict[str, Any] | None:
    if before is None:
        return None
    return {
        "fields": before.fields,
        "parts": before.parts,
        "steps": [_shift_values(step) for step in before.steps],
        # What a person has named has an infinite merit; JSON has no word for it.
        "standing": [
            (one.root, one.number, one.name, None if math.isinf(one.merit) else one.merit) for one in before.standing
        ],
    }


def _before_of(values: Mapping[str, Any] | None) -> Before | None:
    if values is None:
        return None
    return Before(
        int(values["fields"]),
        int(values["parts"]),
        tuple(Shift(*step) for step in values["steps"]),
        tuple(
            Standing(root, number, name, math.inf if merit is None else merit)
            for root, number, name, merit in values["standing"]
        ),
    )
