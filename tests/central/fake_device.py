"""A device without a camera: real messages, made by the agent's own builders, with numbers of its own."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np

from agent.delivery.messages import Draft, event_draft, field_drafts, serialise, stamp, state_body
from agent.delivery.topics import Topics
from agent.domain import (
    AgentState,
    Box,
    Cell,
    CellStatus,
    Classification,
    ClockReading,
    Detection,
    FieldResult,
    Frame,
    FrameQuality,
    ModelIdentity,
    Provenance,
)

BEGAN = datetime(2026, 11, 25, 8, 0, tzinfo=timezone.utc)
CLASSES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil")
PROVENANCE = Provenance(
    "0.1.0",
    ModelIdentity("yolov10n", "0.1.0", "a" * 64),
    ModelIdentity("shufflenetv2", "0.1.0", "b" * 64),
    "ai-edge-litert 2.3.0",
    "xnnpack",
    "c" * 64,
)


@dataclasses.dataclass(frozen=True)
class Sent:
    """A message with its number, as the outbox would hand it to the broker."""

    stream: str
    boot: int
    seq: int
    topic: str
    payload: bytes

    @property
    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.payload)
        return body


class FakeDevice:
    """Numbers its messages like an outbox: without gaps, over boots."""

    def __init__(self, device: str = "scope", site: str = "lab", sample: str = "s-1", boot: int = 1) -> None:
        self.topics = Topics(site, device)
        self.sample = sample
        self.boot = boot
        self._seqs: Counter[str] = Counter()
        self._frames = 0
        self._cells = 0

    def restart(self) -> None:
        self.boot += 1

    def lose_outbox(self) -> None:
        """The file is lost: numbers begin at 1 again, under a higher boot."""
        self.boot += 1
        self._seqs.clear()

    def field(self, cells: int = 3) -> Sent:
        return self.field_with_cells(cells)[0]

    def fields(self, count: int, cells: int = 3) -> list[Sent]:
        return [self.field(cells) for _ in range(count)]

    def field_with_cells(self, cells: int = 3) -> list[Sent]:
        """The field's message, then its cells one by one."""
        result = self._result(cells)
        sent: list[Sent] = []
        for draft in field_drafts(result, self.topics, self.sample, with_cells=True):
            body = dict(draft.body)
            if draft.belongs_to:
                body[f"{draft.belongs_to}_id"] = sent[0].body["id"]
            if draft.stream == "cell" and cells == 0:
                continue
            sent.append(self.number(dataclasses.replace(draft, body=body)))
        return sent

    def field_draft(self, cells: int = 3) -> Draft:
        """A field as the pipeline hands it to the outbox, which gives it its number."""
        return field_drafts(self._result(cells), self.topics, self.sample, with_cells=False)[0]

    def event(self, kind: str = "agent-started", message: str = "for people") -> Sent:
        return self.number(event_draft(kind, message, self.topics, at=BEGAN))

    def number(self, draft: Draft) -> Sent:
        """Give the next number of its stream to a draft."""
        self._seqs[draft.stream] += 1
        seq = self._seqs[draft.stream]
        payload = serialise(stamp(draft.body, self.topics.device, self.boot, seq))
        return Sent(draft.stream, self.boot, seq, draft.topic, payload)

    def state(self, state: AgentState = AgentState.READY) -> tuple[str, bytes]:
        body = state_body(state, device=self.topics.device, site=self.topics.site, boot=self.boot, at=BEGAN)
        return self.topics.state, serialise(body)

    def document(self, topic: str, body: Mapping[str, Any]) -> tuple[str, bytes]:
        return topic, serialise(body)

    def _result(self, cells: int) -> FieldResult:
        self._frames += 1
        number = self._frames
        frame = Frame(
            number,
            np.zeros((48, 64, 3), np.uint8),
            BEGAN + timedelta(seconds=number),
            number * 1_000_000_000,
            f"{number:064x}",
            "fake",
        )
        made = tuple(self._cell(index) for index in range(cells))
        return FieldResult(
            frame=frame,
            quality=FrameQuality(True, (), 100.0, 0.5),
            cells=made,
            counts=Counter(cell.class_name for cell in made),
            unique_counts={},
            duplicates=0,
            timing_ms={"capture": 1.0, "total": 40.0},
            provenance=PROVENANCE,
            clock=ClockReading(True, 0.2),
        )

    def _cell(self, index: int) -> Cell:
        self._cells += 1
        name = CLASSES[index % len(CLASSES)]
        probabilities = {one: 0.9 if one == name else 0.1 / (len(CLASSES) - 1) for one in CLASSES}
        return Cell(
            cell_id=f"{self.sample}-{self._cells}",
            detection=Detection(Box(1.0 + index, 2.0, 11.0 + index, 12.0), "WBC", 0.95),
            class_name=name,
            probability=0.9,
            classification=Classification(name, 0.9, probabilities),
            status=CellStatus.ACCEPTED,
        )
