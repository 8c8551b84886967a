"""The desk: where commands are judged and turned into what is to be stored. On the pipeline's thread, between frames.

    InboundCommand --> read --> done before? --> do --> Deed (reply, sample, messages, notes, audit entry)
                         `refusal                `-- says no: Refused, with a code and words

A deed is stored as a whole by the pipeline: reply, audit, sample and messages in one transaction, so that after a power
cut a command is either done and answered or not begun. What lies outside the outbox (the configuration, the models'
slots) is done first and is the same when it is done again.
"""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, cast

from agent.analysis.agreement import Answer
from agent.analysis.cells import UNIDENTIFIED
from agent.analysis.sample import ENDED, NotNow, Trigger, begin, change
from agent.config import SampleSection
from agent.delivery.audit import Entry
from agent.delivery.commands import (
    Amend,
    Command,
    Gatekeeper,
    InboundCommand,
    ModelStage,
    OfSample,
    Refusal,
    Replay,
    Start,
    Stop,
    canonical_json,
    read_command,
)
from agent.delivery.messages import Draft, RetainedDocument, Severity, event_draft, rfc3339_ms
from agent.delivery.outbox import Outbox
from agent.delivery.reports import Reply
from agent.domain import SampleState
from agent.errors import ConfigError, ModelError
from agent.health import SelfTest
from agent.reporting import (
    ARTEFACT,
    KEPT_SAMPLES,
    Reporter,
    archive,
    cell_key,
    forget_waiting,
    kept_key,
    read_kept,
    rename_cell,
)
from agent.review import answer_note, answers_key

logger = logging.getLogger(__name__)

NO_SAMPLE_YET = SampleState("none", phase="idle")
"""Before the first sample; it is never published."""

MOST_REFUSALS_TOLD = 30
REFUSALS_WITHIN_S = 60.0
"""So many refusals are audited and told within this time; the next one that is says how many were not."""

NUMBER_KEY = "sample-number"
"""Note: how many samples this outbox has begun; tells their order, and goes into the id of those that nobody named."""


class Refused(Exception):
    """A command that is understood and cannot be done. code: for machines."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


@dataclass(frozen=True, slots=True, eq=False)
class Deed:
    """What a command gives, to be stored as a whole. sample: None = unchanged; entry: None = not audited.

    answer_to: the transaction that must not be done again. wants_snapshot: the next frame is to be published as a
    picture. is_done_outside: models or configuration have changed already. learns_anew: what is usual is forgotten.
    """

    reply: Reply
    sample: SampleState | None = None
    drafts: tuple[Draft, ...] = ()
    documents: tuple[RetainedDocument, ...] = ()
    notes: Mapping[str, str | None] | None = None
    entry: Entry | None = None
    answer_to: str | None = None
    answer: str = ""
    is_repeated: bool = False
    wants_snapshot: bool = False
    is_done_outside: bool = False
    learns_anew: bool = False

    @property
    def must_be_stored(self) -> bool:
        return self.answer_to is not None or self.entry is not None or bool(self.drafts)


@dataclass(frozen=True, slots=True, eq=False)
class NextSlide:
    """The sample of another slide, running, and what is to be stored with its first field."""

    sample: SampleState
    drafts: tuple[Draft, ...]
    documents: tuple[RetainedDocument, ...]
    notes: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Done:
    """What a command did outside the outbox, in words. facts: for the reply and the audit."""

    message: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Instruments:
    """What commands may reach beside the sample; each is called on the pipeline's thread and may take its time.

    self_test raises ModelError. reload raises ConfigError, or Refused where a key needs a restart. relearn says from
    what is learnt anew, and raises Refused where nothing is. stage, activate and roll_back raise ModelError, Refused
    where there is nothing to switch to.
    """

    self_test: Callable[[], SelfTest]
    reload: Callable[[], Done]
    relearn: Callable[[], Done]
    stage: Callable[[str], Done]
    activate: Callable[[], Done]
    roll_back: Callable[[], Done]
    replay: Callable[[str, int, int], Done]
    describe: Callable[[], Mapping[str, Any]]


class Desk:
    """Does commands; owned by the pipeline's thread. outbox: that thread's own; only read here."""

    def __init__(
        self,
        outbox: Outbox,
        gatekeeper: Gatekeeper,
        defaults: Callable[[], SampleSection],
        instruments: Instruments,
        clock: Callable[[], datetime],
        is_clock_true: Callable[[], bool],
        monotonic_s: Callable[[], float],
    ) -> None:
        self._outbox = outbox
        self._gatekeeper = gatekeeper
        self._defaults = defaults
        self._instruments = instruments
        self._clock = clock
        self._is_clock_true = is_clock_true
        self._monotonic_s = monotonic_s
        self._told_at_s: deque[float] = deque()
        self._untold = 0

    def judge(self, inbound: InboundCommand) -> Command | Refusal:
        """Whether an arrived command may be done."""
        now = self._clock() if self._is_clock_true() else None
        return read_command(inbound, self._gatekeeper, monotonic_s=self._monotonic_s(), now=now)

    def refuse(self, refusal: Refusal, reporter: Reporter) -> Deed:
        """The reply to a command that was not understood or is not allowed; the latter is audited."""
        reply = Reply(refusal.name, refusal.transaction, "refused", refusal.code, refusal.message, {})
        if refusal.code not in ("not-allowed", "retained") or not self._may_tell():
            return Deed(reply)
        name = _word(refusal.name)
        detail = {"command": name, "code": refusal.code, "not_told_before": self._untold}
        self._untold = 0
        event = self._event(reporter, "command-refused", f"{name}: {refusal.message}", "warning", detail)
        entry = Entry(f"cmd.{name}", "refused", refusal.message, refusal.by, None, refusal.transaction, detail)
        return Deed(reply, drafts=(event,), entry=entry if refusal.code == "not-allowed" else None)

    def _may_tell(self) -> bool:
        """Whether one more refusal may be recorded: whoever sends thousands must not fill the disk with them."""
        now_s = self._monotonic_s()
        while self._told_at_s and now_s - self._told_at_s[0] > REFUSALS_WITHIN_S:
            self._told_at_s.popleft()
        if len(self._told_at_s) >= MOST_REFUSALS_TOLD:
            self._untold += 1
            return False
        self._told_at_s.append(now_s)
        return True

    def do(self, command: Command, sample: SampleState, reporter: Reporter) -> Deed:
        """Do a command, or say why not. Raises OutboxError when what is needed cannot be read."""
        if command.name == "ping":
            return Deed(self._reply(command, "alive", {**self._instruments.describe(), **_where(sample)}))
        if (before := self._outbox.answer(command.transaction)) is not None:
            return self._repeat(command, before)
        try:
            deed = self._do(command, sample, reporter)
        except Refused as refused:
            deed = Deed(Reply(command.name, command.transaction, "refused", refused.code, str(refused), {}))
        except NotNow as refused:
            words = Reply(command.name, command.transaction, "refused", "not-now", str(refused), _where(sample))
            deed = Deed(words)
        except (ModelError, ConfigError) as error:
            code = "model" if isinstance(error, ModelError) else "configuration"
            deed = self._failed(command, code, str(error), reporter)
        return self._remember(command, deed)

    # ---- the commands

    def _do(self, command: Command, sample: SampleState, reporter: Reporter) -> Deed:
        request, tools = command.request, self._instruments
        if isinstance(request, Start):
            return self._start(command, request, sample, reporter)
        if isinstance(request, Stop):
            return self._stop(command, request, sample, reporter)
        if isinstance(request, OfSample):
            return self._turn(command, request, sample, reporter)
        if isinstance(request, Amend):
            return self._amend(command, request, sample, reporter)
        if isinstance(request, Replay):
            return self._tell(command, tools.replay(request.stream, request.from_seq, request.to_seq))
        if isinstance(request, ModelStage):
            return self._tell(command, tools.stage(request.folder), "model-staged", reporter)
        if command.name == "model.activate":
            return self._tell(command, tools.activate(), "model-activated", reporter)
        if command.name == "model.rollback":
            return self._tell(command, tools.roll_back(), "model-rolled-back", reporter)
        if command.name == "reload":
            return self._tell(command, tools.reload(), "config-reloaded", reporter)
        if command.name == "relearn":
            return replace(self._tell(command, tools.relearn(), "drift-relearnt", reporter), learns_anew=True)
        if command.name == "selftest":
            test = tools.self_test()
            return self._tell(command, Done(test.detail, {"at": rfc3339_ms(test.at)}), "self-test", reporter)
        if command.name == "snapshot":
            words = "the next frame is published on image/{sample}/frame-{n}"
            return replace(self._tell(command, Done(words, {})), wants_snapshot=True)
        raise AssertionError(f"the command list has {command.name}, the desk has not")

    def _start(self, command: Command, request: Start, sample: SampleState, reporter: Reporter) -> Deed:
        section = self._defaults()
        at = self._clock()
        number = next_number(self._outbox)
        sid = request.sample or section.id or new_sid(at, self._outbox.boot, number)
        if sid == sample.sid or self._outbox.note(kept_key(sid)) is not None:
            words = f"there is a sample {sid} already; name another, its cells must not get the same ids"
            raise Refused("sample-exists", words)
        fresh = fresh_sample(sid, number, section, request)
        started = begin(None if sample.phase == "idle" else sample, fresh, rfc3339_ms(at))
        event = self._event(reporter, "sample-opened", f"sample {sid}", detail={"sample": sid})
        documents, notes = archive(sample, sid, self._outbox, reporter.topics)
        return Deed(
            self._reply(command, f"sample {sid} runs", _where(started)),
            started,
            (event,),
            documents,
            {**notes, NUMBER_KEY: str(number)},
            entry=self._entry(command, f"sample {sid} begun", {"sample": sid, "accession": started.accession}),
        )

    def next_slide(self, sample: SampleState, reporter: Reporter) -> NextSlide:
        """Another slide is seen: the sample ends in order, if it has not yet, and the next one begins."""
        at = self._clock()
        drafts: tuple[Draft, ...] = ()
        documents: tuple[RetainedDocument, ...] = ()
        notes: Mapping[str, str | None] = {}
        if sample.phase not in ENDED:
            ending = reporter.finish(sample, at, "next-slide")
            sample, drafts, notes = ending.sample, ending.drafts, ending.notes
            documents = reporter.documents(sample, boot=self._outbox.boot, at=at)
        section, number = self._defaults(), next_number(self._outbox)
        sid = new_sid(at, self._outbox.boot, number)
        started = begin(sample, fresh_sample(sid, number, section), rfc3339_ms(at))
        event = self._event(reporter, "sample-opened", f"sample {sid}: another slide is seen", detail={"sample": sid})
        cleared, archived = archive(sample, sid, self._outbox, reporter.topics)
        gone = {document.topic for document in cleared}
        return NextSlide(
            started,
            (*drafts, event),
            (*(document for document in documents if document.topic not in gone), *cleared),
            {**archived, **notes, NUMBER_KEY: str(number)},
        )

    def _stop(self, command: Command, request: Stop, sample: SampleState, reporter: Reporter) -> Deed:
        self._must_be(request, sample)
        trigger: Trigger = "abort" if request.abort else "stop"
        stopped = change(sample, trigger, rfc3339_ms(self._clock()), "aborted" if request.abort else "command")
        drafts: tuple[Draft, ...] = ()
        notes: Mapping[str, str | None] = {}
        if request.abort:
            notes = forget_waiting(sample.sid, self._outbox)  # nobody can name a cell of it any more
            words = f"sample {sample.sid} was thrown over after {sample.fields} fields"
            drafts = (self._event(reporter, "sample-aborted", words, "warning", {"sample": sample.sid}),)
        words = f"sample {sample.sid} is {stopped.phase}"
        return Deed(
            self._reply(command, words, _where(stopped)),
            stopped,
            drafts,
            notes=notes,
            entry=self._entry(command, words, {"sample": sample.sid, "fields": sample.fields}),
        )

    def _turn(self, command: Command, request: OfSample, sample: SampleState, reporter: Reporter) -> Deed:
        self._must_be(request, sample)
        turned = change(sample, cast("Trigger", command.name), rfc3339_ms(self._clock()))
        words = f"sample {sample.sid} is {turned.phase}"
        event = self._event(reporter, f"sample-{command.name}d", words, detail={"sample": sample.sid})
        entry = self._entry(command, words, {"sample": sample.sid})
        return Deed(self._reply(command, words, _where(turned)), turned, (event,), entry=entry)

    def _amend(self, command: Command, request: Amend, sample: SampleState, reporter: Reporter) -> Deed:
        if request.by is None:
            raise Refused("bad-request", "by: an amendment says who makes it")
        allowed = (*reporter.rules.kinds, UNIDENTIFIED, ARTEFACT)
        if request.cell_class not in allowed:
            raise Refused("unknown-class", f"class {request.cell_class}: known are {', '.join(allowed)}")
        kept = None
        is_current = request.sample == sample.sid
        if not is_current or sample.phase in ENDED:
            text = self._outbox.note(kept_key(request.sample))
            if text is None:
                raise Refused("unknown-sample", f"sample {request.sample}: the {KEPT_SAMPLES} newest can be amended")
            kept = read_kept(text)
        key = cell_key(request.sample, request.cell_id)
        before = self._outbox.note(key)
        if before is None:
            raise Refused("unknown-cell", f"cell {request.cell_id}: no counted cell of this sample that can be named")
        facts = {"sample": request.sample, "cell_id": request.cell_id, "from": before, "to": request.cell_class}
        answer = Answer(
            request.cell_id, before, request.cell_class, request.by, rfc3339_ms(self._clock()), request.reason
        )
        place = answers_key(request.sample, request.cell_id)
        given = {place: answer_note(self._outbox.note(place), answer)}
        if before == request.cell_class:
            words = f"cell {request.cell_id} is {before} already; that a person says so too is noted"
            return replace(self._tell(command, Done(words, facts)), notes=given)

        amended = rename_cell(sample if is_current or kept is None else kept.sample, before, request.cell_class)
        drafts: tuple[Draft, ...] = ()
        documents: tuple[RetainedDocument, ...] = ()
        notes: dict[str, str | None] = {key: request.cell_class, **given}
        if kept is not None:
            then = replace(reporter, provenance=kept.provenance)
            amended, report = then.report(amended, self._clock())
            drafts = (report,)
            notes.update(then.keep(amended))
            (_, differential) = then.documents(amended, boot=self._outbox.boot, at=self._clock())
            documents = (differential,)
        words = f"cell {request.cell_id} was {before}, is {request.cell_class}"
        return Deed(
            self._reply(command, words, {**facts, "reports": amended.reports}),
            amended if is_current else None,
            drafts,
            documents,
            notes,
            entry=self._entry(command, words, {**facts, "reason": request.reason}),
        )

    # ---- the parts

    @staticmethod
    def _must_be(request: OfSample, sample: SampleState) -> None:
        if request.sample is not None and request.sample != sample.sid:
            raise Refused("other-sample", f"the sample here is {sample.sid}, not {request.sample}")

    def _tell(self, command: Command, done: Done, event: str | None = None, reporter: Reporter | None = None) -> Deed:
        drafts: tuple[Draft, ...] = ()
        if event is not None and reporter is not None:
            drafts = (self._event(reporter, event, done.message),)
        entry = self._entry(command, done.message, done.facts)
        return Deed(self._reply(command, done.message, done.facts), drafts=drafts, entry=entry)

    def _failed(self, command: Command, code: str, message: str, reporter: Reporter) -> Deed:
        kind = {"reload": "config-refused", "selftest": "self-test-failed"}.get(command.name, "model-refused")
        event = self._event(reporter, kind, message, "error", {"command": command.name})
        reply = Reply(command.name, command.transaction, "failed", code, message, {})
        entry = replace(self._entry(command, message, {}), outcome="failed")
        return Deed(reply, drafts=(event,), entry=entry)

    def _reply(self, command: Command, message: str, facts: Mapping[str, Any]) -> Reply:
        return Reply(command.name, command.transaction, "ok", "ok", message, facts)

    @staticmethod
    def _entry(command: Command, message: str, facts: Mapping[str, Any]) -> Entry:
        request = command.request
        return Entry(
            f"cmd.{command.name}", "done", message, request.by, command.kind.role, request.transaction, _flat(facts)
        )

    def _event(
        self,
        reporter: Reporter,
        kind: str,
        message: str,
        severity: Severity = "info",
        detail: Mapping[str, object] | None = None,
    ) -> Draft:
        return event_draft(kind, message, reporter.topics, at=self._clock(), severity=severity, detail=detail)

    def _remember(self, command: Command, deed: Deed) -> Deed:
        """Keep the answer, so that the same transaction is not done twice; a refusal is audited as one."""
        reply = deed.reply
        is_operators = command.kind.role == "operator" and reply.status == "ok"
        is_done_outside = is_operators and not deed.learns_anew  # what is learnt stands in the outbox
        kept = {"digest": command.digest, "command": command.name, "status": reply.status, "code": reply.code}
        answer = canonical_json({**kept, "message": reply.message, "data": dict(reply.data)}).decode()
        entry = deed.entry
        if entry is None:
            entry = replace(self._entry(command, reply.message, {"code": reply.code}), outcome="refused")
        return replace(deed, answer_to=command.transaction, answer=answer, entry=entry, is_done_outside=is_done_outside)

    @staticmethod
    def _repeat(command: Command, before: str) -> Deed:
        said = json.loads(before)
        if (said["digest"], said["command"]) != (command.digest, command.name):
            words = f"transaction {command.transaction} was used for another command; give each its own"
            return Deed(Reply(command.name, command.transaction, "refused", "transaction-reused", words, {}))
        reply = Reply(command.name, command.transaction, said["status"], said["code"], said["message"], said["data"])
        return Deed(reply, is_repeated=True)


def next_number(outbox: Outbox) -> int:
    """The number of the sample that this outbox begins next; the append that begins it notes it under NUMBER_KEY."""
    return int(outbox.note(NUMBER_KEY) or 0) + 1


def fresh_sample(sid: str, number: int, section: SampleSection, request: Start | None = None) -> SampleState:
    """A sample as it is asked for, and where nothing is asked as the configuration says; not begun yet.

    The configured accession is for a sample that begins by itself: with a request it would stick to the next slides.
    """
    asked = request or Start(transaction="none")
    return SampleState(
        sid,
        phase="idle",
        accession=asked.accession or (None if request else section.accession),
        age_band=asked.age_band or section.age_band,
        target_cells=asked.stop_at_cells or section.stop_at_cells,
        target_half_width_pct=asked.stop_at_half_width_pct or section.stop_at_half_width_pct,
        number=number,
    )


def new_sid(at: datetime, boot: int, number: int) -> str:
    """An id for a sample that nobody named; none is given twice on a device."""
    return f"s-{at:%Y%m%d}-b{boot}" if number == 1 else f"s-{at:%Y%m%d}-b{boot}-{number}"


def _where(sample: SampleState) -> dict[str, Any]:
    sid = None if sample.phase == "idle" else sample.sid
    return {"sample": sid, "phase": sample.phase, "fields": sample.fields}


def _flat(facts: Mapping[str, Any]) -> dict[str, object]:
    """Facts whose names fit an audit entry; lists of mappings become text."""
    return {
        re.sub(r"[^a-z0-9_]", "_", name.lower()): value
        if not isinstance(value, (dict, list))
        else canonical_json(value).decode()
        for name, value in facts.items()
    }


def _word(name: str) -> str:
    """A command's name as it may stand in an audit entry, whatever was sent."""
    return name if re.fullmatch(r"[a-z.-]{1,32}", name) else "unknown"
