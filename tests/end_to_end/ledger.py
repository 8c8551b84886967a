"""What a careful subscriber makes of all the messages of one device."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from agent.delivery.messages import KINDS, load_schema


class Ledger:
    """What a careful subscriber makes of the messages: each checked against its schema, repeats dropped by id."""

    def __init__(self, messages: list[Any]) -> None:
        self.states: list[str] = []
        self.infos: list[dict[str, Any]] = []
        self.healths: list[dict[str, Any]] = []
        self.fields: dict[str, dict[str, Any]] = {}
        self.cells: dict[str, dict[str, Any]] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self.repeats = 0
        validators = {
            kind: jsonschema.Draft202012Validator(
                load_schema(kind), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
            for kind in KINDS
        }
        self.samples: list[dict[str, Any]] = []
        self.reports: dict[str, dict[str, Any]] = {}
        self.audit: dict[str, dict[str, Any]] = {}
        self.replies: list[dict[str, Any]] = []
        for message in messages:
            assert message.qos == 1
            if message.kind in ("cmd", "ack"):
                continue  # to the agent, not from it
            if message.payload == b"":  # a retained topic is cleared
                assert message.kind in ("alert", "sample", "differential")
                continue
            validators[message.kind].validate(message.body)
            self._take(message.kind, message.body)

    def _take(self, kind: str, body: dict[str, Any]) -> None:
        if kind in ("state", "info", "health"):
            {
                "state": lambda: self.states.append(body["state"]),
                "info": lambda: self.infos.append(body),
                "health": lambda: self.healths.append(body),
            }[kind]()
            return
        if kind in ("alert", "sample", "reply"):
            {"alert": [], "sample": self.samples, "reply": self.replies}[kind].append(body)
            return
        if kind == "differential" and "seq" not in body:
            return  # the retained document; the numbered one is what counts
        known = {
            "field": self.fields,
            "cell": self.cells,
            "event": self.events,
            "differential": self.reports,
            "audit": self.audit,
        }[kind]
        if (before := known.get(body["id"])) is not None:
            self.repeats += 1
            same = [json.dumps({**one, "historical": None}, sort_keys=True) for one in (before, body)]
            assert same[0] == same[1], "a repeat must say the same"
        known[body["id"]] = body

    def check_numbers(self) -> None:
        """Every stream counts from 1 without gaps: the subscriber can prove that nothing is missing."""
        for stream in (self.fields, self.cells, self.events, self.reports, self.audit):
            seqs = sorted(body["seq"] for body in stream.values())
            assert seqs == list(range(1, len(seqs) + 1))

    def check_cells(self) -> None:
        """The cells one by one are the cells of the fields, and no cell_id names two cells."""
        in_fields = [cell for field in self.fields.values() for cell in field["cells"]]
        ids = [cell["cell_id"] for cell in in_fields]
        assert len(set(ids)) == len(ids)
        one_by_one = {cell["cell_id"]: cell for cell in self.cells.values()}
        assert set(one_by_one) == set(ids)
        for cell in in_fields:
            assert {key: one_by_one[cell["cell_id"]][key] for key in cell} == cell
        for field in self.fields.values():
            assert sum(field["counts"].values()) == len(field["cells"])
            assert all(cell["field_id"] in self.fields for cell in self.cells.values())

    def check_all(self, pictures: int) -> None:
        """As many fields as pictures, each picture once, all numbers and cells in order."""
        assert len({field["frame"]["sha256_16"] for field in self.fields.values()}) == pictures
        assert len(self.fields) == pictures
        self.check_numbers()
        self.check_cells()
