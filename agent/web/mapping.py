"""The map of the slide as the report draws it, kept up from the field messages that are stored on this device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice

from agent.delivery.messages import Body
from agent.delivery.outbox import Outbox
from agent.delivery.topics import Topics
from agent.report.drawing import part_svg
from agent.report.slide_map import MapMaker

FIELDS_AT_ONCE = 200
"""Fields that are taken in for one answer, some 20 ms of work each hundred: a long sample is there after a few."""

MOST_FIELDS = 5000
"""Fields of one sample on the map; a sample that goes on for days would take memory without end."""

MOST_PARTS = 6
"""Parts that are drawn, the largest first."""


class SampleMap:
    """The map of one sample; used on one thread."""

    def __init__(self, topics: Topics, sid: str) -> None:
        self.sid = sid
        self._topic = topics.field(sid)
        self._maker = MapMaker()
        self._superseded: set[str] = set()
        self._after_row = 0
        self._fields = 0

    def read(self, outbox: Outbox, colours: Mapping[str, str]) -> Body:
        """What is drawn now, of the fields that are kept here. Raises OutboxError."""
        more = min(FIELDS_AT_ONCE, MOST_FIELDS - self._fields)
        for row in islice(outbox.of_topic("field", self._topic, self._after_row), more):
            self._after_row = row.row_id
            if not row.is_intact:
                continue
            field = json.loads(row.payload)
            self._fields += 1
            self._maker.add(field, {})
            self._superseded.update(cell_id for cell in field["cells"] for cell_id in cell.get("supersedes", ()))
        found = self._maker.finish(frozenset(self._superseded))
        parts = sorted(found["parts"], key=lambda part: -len(part["fields"]))
        return {
            "sample": self.sid,
            "fields": self._fields,
            "is_full": self._fields >= MOST_FIELDS,
            "parts": [
                {"fields": len(part["fields"]), "cells": len(part["cells"]), "svg": part_svg(part, colours)}
                for part in parts[:MOST_PARTS]
            ],
            "parts_left_out": len(parts[MOST_PARTS:]),
            "unknown_places": len(found["unknown_places"]),
            "cells_left_out": found["cells_left_out"],
        }
