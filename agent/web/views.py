"""From the agent's snapshots to what the page shows: values for JSON. Nothing here changes anything.

What subscribers are told (`sample`, `differential`, `health`) is told here in the same words, by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import agent
from agent import RESEARCH_USE_ONLY
from agent.analysis.cells import UNIDENTIFIED
from agent.analysis.quality import UNCHANGED
from agent.analysis.sample import TRANSITIONS
from agent.bench import Bench
from agent.camera.grabber import FROZEN
from agent.config import Config
from agent.delivery.commands import InboundCommand
from agent.delivery.messages import Body, health_body, rfc3339_ms
from agent.delivery.outbox import Outbox
from agent.delivery.reports import Alert
from agent.delivery.topics import Topics
from agent.domain import AgeBand, AgentState, Cell, SampleState
from agent.health import HealthSnapshot, MachineReading
from agent.latest import Latest, SeenFrame
from agent.report.drawing import colours_of, differential_svg
from agent.report.words import FLAG_WORDS
from agent.reporting import ANSWERS, ARTEFACT, REVIEW, kept_key
from agent.review import CropStore, KeptCell, as_begun, read_kept_cells

REFRESH_S = 1.0
"""s; how often a browser asks anew."""

MOST_REVIEW_CELLS = 500
"""Cells of the review list that are told at once: more than a person names in an hour."""

REASON_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "dark": "Too dark: is the lamp on and bright enough?",
        "saturated": "Too bright: large parts are pure white. Turn the lamp or the exposure down.",
        "empty": "Bare glass: nothing but ground is in view.",
        "colour-cast": "The ground has another colour than it should: check white balance, lamp and stain.",
        "moving": "The stage was moving when the picture was taken.",
        "blurred": "Out of focus.",
        UNCHANGED: "The same place as the last field: move the stage on to count more.",
        FROZEN: "The camera gave the very same picture again.",
        "no-sample": "No sample is running.",
        "unsayable": "The models gave no usable numbers for this picture; the log says more.",
    }
)
"""Why a frame gave no field, and what to do. A reason that does not stand here is shown as it is."""

SAME_VIEW = frozenset({UNCHANGED, FROZEN})
"""For these the field that was counted of this view stays in sight, with its boxes."""


FrameAndField = tuple[SeenFrame | None, SeenFrame | None]
"""As `Latest.read` gives them: the newest frame, the newest that gave a field."""


@dataclass(frozen=True, slots=True, eq=False)
class Sights:
    """What the page may look at and reach. Each answers at once, on any thread, with a frozen value.

    send: puts a command where those of the broker go; False = none are taken now. examined_with: the configuration by
    which an uploaded picture is examined. open_outbox: a connection of one's own, for reading. folder: of the outbox.
    """

    topics: Topics
    boot: int
    folder: Path
    latest: Latest
    health: Callable[[], HealthSnapshot]
    machine: Callable[[], MachineReading]
    state: Callable[[], AgentState]
    sample: Callable[[], SampleState]
    bench: Callable[[], Bench]
    alerts: Callable[[], Sequence[Alert]]
    open_outbox: Callable[[], Outbox]
    send: Callable[[InboundCommand], bool]
    examined_with: Callable[[], Config]


def state_body(
    sights: Sights, seen: FrameAndField, *, at: datetime, now_s: float, still_s: float, machine: MachineReading
) -> Body:
    """All that is watched, at one moment. still_s: for how long the counting thread has not moved."""
    bench, sample, state, health = sights.bench(), sights.sample(), sights.state(), sights.health()
    documents = bench.reporter.documents(sample, boot=sights.boot, at=at)
    told, differential = (document.body for document in documents) if documents else (None, None)
    return {
        "at": rfc3339_ms(at),
        "site": sights.topics.site,
        "device": sights.topics.device,
        "agent": agent.__version__,
        "notice": RESEARCH_USE_ONLY,
        "classes": class_bodies(bench),
        "answers": [*bench.counting.kinds, UNIDENTIFIED, ARTEFACT],
        "age_bands": get_args(AgeBand),
        "flag_words": {flag: words for flag, words in FLAG_WORDS.items() if flag is not None},
        "sample": None if told is None else {**told, "amendments": sample.amendments, "duplicates": sample.duplicates},
        "may": [trigger for trigger in TRANSITIONS[sample.phase] if trigger != "settle"],
        "differential": differential,
        "chart": _chart(differential),
        "frame": _frame_body(seen, now_s),
        "health": health_body(
            health,
            machine,
            device=sights.topics.device,
            site=sights.topics.site,
            boot=sights.boot,
            at=at,
            state=state,
            interval_s=REFRESH_S,
            restarts=sights.boot - 1,
        ),
        "still_s": round(still_s, 1),
        "alerts": [
            {
                "id": alert.alert_id,
                "severity": alert.severity,
                "message": alert.message,
                "since": rfc3339_ms(alert.since),
            }
            for alert in sights.alerts()
        ],
    }


def class_bodies(bench: Bench) -> list[Body]:
    """Every class of the models in the manifest's order, with the colour that it has in all drawings."""
    kinds = bench.counting.kinds
    # The chart gives its colours in the order of the leukocytes: the same ones here.
    leukocytes = [name for name, kind in kinds.items() if kind == "leukocyte"]
    colours = colours_of((*leukocytes, *kinds))
    return [{"class": name, "kind": kind, "colour": colours[name]} for name, kind in kinds.items()]


def _chart(differential: Mapping[str, Any] | None) -> str | None:
    return differential_svg(differential["shares"]) if differential and differential["shares"] else None


def shown_frame(seen: FrameAndField) -> SeenFrame | None:
    """The frame whose picture is shown: the newest, unless it shows no more than the last field did."""
    frame, field = seen
    return field if field is not None and frame is not None and frame.dropped in SAME_VIEW else frame


def _frame_body(seen: FrameAndField, now_s: float) -> Body | None:
    frame, _ = seen
    shown = shown_frame(seen)
    if frame is None or shown is None:
        return None
    return {
        "number": shown.number,
        "sample": shown.sid,
        "captured_at": rfc3339_ms(shown.captured_at),
        "age_s": round(max(0.0, now_s - frame.at_monotonic_s), 1),
        "source": frame.source,
        "size_px": [shown.width_px, shown.height_px],
        "is_counted": frame.dropped is None,
        "reason": frame.dropped,
        "words": None if frame.dropped is None else REASON_WORDS.get(frame.dropped, frame.dropped),
        "took_ms": None if shown.took_ms is None else round(shown.took_ms),
        "focus": None if shown.quality is None else round(shown.quality.focus, 1),
        "place": None if shown.place is None else shown.place.source,
        "cells": [cell_body(cell) for cell in shown.cells],
    }


def cell_body(cell: Cell) -> Body:
    """A cell as it is drawn. is_small: named by the detector alone, as red cells are."""
    box = cell.detection.box
    return {
        "cell_id": cell.cell_id,
        "box": [round(edge, 1) for edge in (box.x_min, box.y_min, box.x_max, box.y_max)],
        "class": cell.class_name,
        "probability": round(cell.probability, 3),
        "status": cell.status.value,
        "is_small": cell.classification is None,
    }


# ------------------------------------------------------------------------------------------------------- the review


def review_body(outbox: Outbox, crops: CropStore) -> Body:
    """Cells that wait for a person, and those that were answered; the newest first."""
    kept = as_begun(read_kept_cells(outbox.notes(REVIEW), outbox.notes(ANSWERS), None), outbox.notes(kept_key("")))
    listed = [cell for cell in kept if cell.is_open or cell.answers][::-1]
    waiting = [cell for cell in listed if cell.is_open]
    answered = [cell for cell in listed if cell.answers]
    return {
        "open": len(waiting),
        "answered": len(answered),
        "cells": [
            {**kept_cell_body(cell), "has_picture": crops.path(cell.sid, cell.cell_id).exists()}
            for cell in (*waiting[:MOST_REVIEW_CELLS], *answered[:MOST_REVIEW_CELLS])
        ],
    }


def kept_cell_body(cell: KeptCell) -> Body:
    """A cell of the review list: what the model says and how sure, and what persons said."""
    return {
        "sample": cell.sid,
        "cell_id": cell.cell_id,
        "class": cell.class_name,
        "guess": cell.guess,
        "probability": cell.probability,
        "margin": cell.margin,
        "reason": cell.reason,
        "is_open": cell.is_open,
        "answers": [
            {"person": answer.person, "by": answer.by, "at": answer.at, "reason": answer.reason}
            for answer in cell.answers
        ],
    }
