"""The record of a sample from the device's own outbox: beside a running agent, or when it has ended."""

from __future__ import annotations

import json
from collections.abc import Iterator

from agent.delivery.outbox import Outbox
from agent.delivery.topics import Topics
from agent.report.record import Body, NothingToReport, SampleRecord, with_retained
from agent.reporting import ANSWERS, REVIEW, kept_key, read_kept
from agent.review import CropStore, read_kept_cells


def read_device(outbox: Outbox, topics: Topics, sid: str, crops: CropStore | None = None) -> SampleRecord:
    """Everything that this device still has of a sample. Raises NothingToReport, OutboxError."""
    cells = read_kept_cells(outbox.notes(f"{REVIEW}{sid}/"), outbox.notes(f"{ANSWERS}{sid}/"), crops)
    told = outbox.document(topics.differential(sid))
    numbered = list(read_messages(outbox, "differential", topics.differential(sid)))
    reports = with_retained(numbered, None if told is None else json.loads(told))
    if not reports:
        raise NothingToReport(
            f"{outbox.path}: there is no differential of sample {sid} here; `hematovision report list` names others"
        )
    return SampleRecord(
        "device",
        topics.site,
        topics.device,
        sid,
        differentials=reports,
        sample=_sample(outbox, topics, sid),
        fields=read_messages(outbox, "field", topics.field(sid)),
        answers=[cell.answers[-1] for cell in cells if cell.answers],
        crops={cell.cell_id: cell for cell in cells},
    )


def reported_samples(outbox: Outbox, topics: Topics) -> list[tuple[str, str]]:
    """Ids of the samples that can be reported, with the status of each, the newest last."""
    found = ((topic, outbox.document(topic)) for topic in outbox.told(f"{topics.base}/differential/"))
    return [(topic.rpartition("/")[2], str(json.loads(told)["status"])) for topic, told in found if told is not None]


def read_messages(outbox: Outbox, stream: str, topic: str) -> Iterator[Body]:
    """The messages of a topic that are here, in order; damaged ones are passed over."""
    for row in outbox.of_topic(stream, topic):
        if row.is_intact:
            yield json.loads(row.payload)


def _sample(outbox: Outbox, topics: Topics, sid: str) -> Body | None:
    told = outbox.document(topics.sample(sid))
    if told is not None:
        body: Body = json.loads(told)
        return body
    kept = outbox.note(kept_key(sid))
    if kept is None:
        return None
    state = read_kept(kept).sample
    return {"opened_at": state.opened_at, "ended_at": state.ended_at, "end_reason": state.end_reason}
