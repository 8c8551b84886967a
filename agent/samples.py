"""Samples that no command begins or ends: they begin with the agent, and end with their source."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime

from agent.analysis.sample import begin
from agent.config import SampleSection
from agent.delivery.messages import rfc3339_ms
from agent.delivery.outbox import Outbox
from agent.desk import NO_SAMPLE_YET, NUMBER_KEY, fresh_sample, new_sid, next_number
from agent.domain import SampleState
from agent.errors import OutboxError
from agent.reporting import Reporter, archive, kept_key, read_kept

logger = logging.getLogger(__name__)


def begin_sample(
    outbox: Outbox, section: SampleSection, now: datetime, reporter: Reporter, *, takes_all_anew: bool
) -> tuple[SampleState, bool]:
    """The sample that was not closed, else a new one, and whether it is new.

    Another id in the configuration ends the sample before and begins another. With `sample.start: command` none is
    begun. With a new one the samples before are archived. takes_all_anew: whether that other sample gets the source
    from its beginning; else it gets what comes now.
    """
    stored, ended = outbox.sample_state(), None
    is_asked = stored is not None and section.id in (None, stored.sid)
    if stored is not None and is_asked and stored.phase != "idle":
        return stored, False
    if stored is not None and not is_asked:
        logger.info("sample %s gives way to %s, which the configuration names", stored.sid, section.id)
        ended = stored
        if stored.phase in ("running", "paused", "finishing"):
            ending = reporter.finish(stored, now, "replaced")
            documents = reporter.documents(ending.sample, boot=outbox.boot, at=now)
            outbox.append(ending.drafts, sample=ending.sample, documents=documents, notes=ending.notes)
            ended = ending.sample
        outbox.clear_sample(with_finished=takes_all_anew)
        stored = None
    if section.start == "command":
        return stored or NO_SAMPLE_YET, False
    number = next_number(outbox)
    fresh = fresh_sample(section.id or new_sid(now, outbox.boot, number), number, section)
    kept = outbox.note(kept_key(fresh.sid))
    earlier = stored if stored is not None or kept is None else read_kept(kept).sample
    if earlier is not None:  # of the same name: no cell_id and no report is given twice
        fresh = replace(fresh, next_cell_number=earlier.next_cell_number, reports=earlier.reports)
    begun = begin(None, fresh, rfc3339_ms(now))
    cleared, archived = archive(ended, begun.sid, outbox, reporter.topics)
    outbox.append((), sample=begun, documents=cleared, notes={**archived, NUMBER_KEY: str(number)})
    return begun, True


def close_sample(outbox: Outbox, sample: SampleState, wanted_id: str | None) -> None:
    """The source has come to its end: the next run takes all of it anew, as a new sample.

    Where the configuration names the sample, that one has the same id; its cells' numbers then go on, so that no
    cell_id is given twice.
    """
    try:
        outbox.clear_sample(with_finished=True)
        if wanted_id is not None:
            closed = SampleState(
                sample.sid, next_cell_number=sample.next_cell_number, reports=sample.reports, phase="idle"
            )
            outbox.append((), sample=closed)
    except OutboxError as error:
        logger.error("sample %s cannot be closed: %s", sample.sid, error)  # noqa: TRY400 - its words say all
