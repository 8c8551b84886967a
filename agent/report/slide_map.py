"""Where the fields of a sample and their cells lie on the slide: as values for JSON, from the messages alone.

Fields that were registered to one another lie in one part, in its own coordinates (frame pixels, the first field at the
origin). How parts lie to each other is not known, until a field joins them: a part of a single field is a field at an
unknown place.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Body = dict[str, Any]

MOST_SPOTS = 4000
"""Cells that are drawn: beyond this they are specks over each other, and the file has megabytes."""

MOST_FIELDS = 2500
"""Fields that are drawn one by one; of more every n-th is, and the map says so."""


class MapMaker:
    """Takes in the fields of a sample one by one; keeps of each what is drawn."""

    def __init__(self) -> None:
        self._fields: list[Body] = []
        self._spots: list[Body] = []
        self._spots_left_out = 0

    def add(self, field: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """One `field` message. names: by cell_id what a person named a cell."""
        place, frame = field.get("place"), field["frame"]
        number = int(field["seq"])
        where = None
        if place is not None:
            x, y = (float(place.get(key) or 0.0) for key in ("x_px", "y_px"))
            where = (int(place["part"]), x, y, float(place.get("turn_deg") or 0.0))
            if "joins" in place:
                self._join(where[0], place["joins"])
        self._fields.append(
            {
                "seq": number,
                "part": None if where is None else where[0],
                "x_px": None if where is None else where[1],
                "y_px": None if where is None else where[2],
                "turn_deg": None if where is None else where[3],
                "width_px": frame.get("width_px") or 0,
                "height_px": frame.get("height_px") or 0,
                "um_per_px": frame.get("um_per_px"),
                "source": "unknown" if place is None else place["source"],
                "confidence": 0.0 if place is None else place["confidence"],
                "nucleated_cells": sum(1 for cell in field["cells"] if cell["probabilities"] and _stands(cell)),
            }
        )
        if where is None:
            return
        for cell in field["cells"]:
            if not cell["probabilities"] or not _stands(cell):
                continue  # red cells would hide all else; another view of a cell is the same cell
            if len(self._spots) >= MOST_SPOTS:
                self._spots_left_out += 1
                continue
            x_min, y_min, x_max, y_max = cell["box"]
            x, y = _on_slide(((x_min + x_max) / 2, (y_min + y_max) / 2), where)
            name = "unidentified" if cell["status"] == "unidentified" else cell["class"]
            spot = {"cell_id": cell["cell_id"], "class": names.get(cell["cell_id"], name), "part": where[0]}
            self._spots.append({**spot, "x_px": round(x, 1), "y_px": round(y, 1)})

    def _join(self, part: int, joined: Mapping[str, Any]) -> None:
        """Let what lies in another part lie in this one."""
        where = (part, joined["x_px"], joined["y_px"], joined["turn_deg"])
        for thing in (*self._fields, *self._spots):
            if thing["part"] == joined["part"]:
                x, y = _on_slide((thing["x_px"], thing["y_px"]), where)
                thing |= {"part": part, "x_px": round(x, 1), "y_px": round(y, 1)}
                if "turn_deg" in thing:
                    thing["turn_deg"] = round(thing["turn_deg"] + where[3], 2)

    def finish(self, superseded: frozenset[str]) -> Body:
        """The map. superseded: cells of which a better view came later."""
        of_part = Counter(field["part"] for field in self._fields if field["part"] is not None)
        by_part: dict[int, list[Body]] = defaultdict(list)
        for field in self._fields:
            if field["part"] is not None and (of_part[field["part"]] > 1 or field["source"] == "stage"):
                by_part[field["part"]].append(field)
        unknown = [
            {"seq": field["seq"], "part": field["part"], "nucleated_cells": field["nucleated_cells"]}
            for field in self._fields
            if field["part"] not in by_part
        ]
        spots = [spot for spot in self._spots if spot["cell_id"] not in superseded and spot["part"] in by_part]
        return {
            "unit": "px",
            "parts": [_part(number, fields, spots) for number, fields in sorted(by_part.items())],
            "unknown_places": unknown,
            "cells_left_out": self._spots_left_out,
        }


def _part(number: int, fields: Sequence[Body], spots: Sequence[Body]) -> Body:
    step = math.ceil(len(fields) / MOST_FIELDS)
    return {
        "part": number,
        "fields": [{key: value for key, value in field.items() if key != "part"} for field in fields[::step]],
        "fields_left_out": len(fields) - len(fields[::step]),
        "cells": [
            {key: value for key, value in spot.items() if key != "part"} for spot in spots if spot["part"] == number
        ],
    }


def _stands(cell: Mapping[str, Any]) -> bool:
    if cell["status"] in ("duplicate", "artefact"):
        return False
    return cell.get("counted") is not False


def _on_slide(point: tuple[float, float], where: tuple[int, float, float, float]) -> tuple[float, float]:
    """A point of a field in its part: as `agent.analysis.registration.Shift.apply` has it."""
    _, x, y, turn_deg = where
    cos, sin = math.cos(math.radians(turn_deg)), math.sin(math.radians(turn_deg))
    return cos * point[0] - sin * point[1] + x, sin * point[0] + cos * point[1] + y


def corners(field: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The four corners of a placed field of the map."""
    where = (0, field["x_px"], field["y_px"], field["turn_deg"])
    width, height = field["width_px"], field["height_px"]
    return [_on_slide(point, where) for point in ((0, 0), (width, 0), (width, height), (0, height))]
