"""The count in progress: the sample, its slide, what was learnt about the device, and the bench they are worked with.

    Frame ----work-------> Outcome --> stored by the intake --accept--> the count stands there
    Deed -----outcome_of-> Outcome     `-- not stored: the count stands where it stood
    the end --finish-----> Outcome

`work` adds to the main path what one frame alone cannot tell: that another slide lies there now.
"""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime, timezone

from agent.analysis.drift import DriftMemory, follow_end, read_drift
from agent.analysis.drift import from_text as drift_from_text
from agent.analysis.drift import to_text as drift_to_text
from agent.analysis.duplicates import SlideMap
from agent.analysis.quality import UNCHANGED, GateMemory, assess_frame
from agent.analysis.quality import from_text as gate_from_text
from agent.analysis.quality import to_text as gate_to_text
from agent.analysis.slide_change import Sight
from agent.bench import Bench
from agent.camera.grabber import FROZEN
from agent.counting.slide_in_view import SlideInView
from agent.delivery.outbox import Outbox
from agent.desk import Deed, Desk
from agent.domain import Frame, SampleState
from agent.health import Health
from agent.machine import read_clock
from agent.pipeline import DRIFT_NOTE, GATE_NOTE, NO_SAMPLE, Outcome, process_frame, with_drift


class Count:
    """Stands where the outbox stands: what a frame or a command gives is accepted after it is stored.

    Owned by the pipeline's thread; sample: may be read on any. bench: what the next frame is worked with.
    """

    def __init__(self, outbox: Outbox, bench: Bench, sample: SampleState, health: Health) -> None:
        """outbox: where the last run left off; read here, and only notes that an older version wrote are rewritten."""
        self.sample = sample
        self.bench = bench
        self.slide = SlideInView(outbox, sample, bench.absence_s)
        self._gate = gate_from_text(outbox.note(GATE_NOTE))
        self._drift = drift_from_text(outbox.note(DRIFT_NOTE))
        self._stopped_ns = 0  # when the sample was told to stop; frames taken before still belong to it
        self._health = health
        self._tell_drift()

    def use_bench(self, bench: Bench) -> None:
        """Work with other models or thresholds from the next frame on."""
        self.slide.use_absence(bench.absence_s)
        self.bench = bench
        self._tell_drift()

    def work(self, frame: Frame, desk: Desk | None) -> Outcome:
        """What a frame gives now. desk: begins the sample of another slide; None = no other slide is looked for."""
        slide_map = self.slide.turn_to(self.sample)
        outcome = process_frame(frame, self.sample, self.bench, read_clock(), self._gate, slide_map)
        if desk is not None and self.slide.is_another(frame, self.sample.phase, lambda: self._look(frame, outcome)):
            outcome = self._begin_next(frame, desk)
        return with_drift(outcome, self._drift, self.bench.drift)

    def _look(self, frame: Frame, outcome: Outcome) -> Sight:
        """What the frame shows, also where it is not counted. outcome: what it gave."""
        reason = outcome.dropped
        if reason == NO_SAMPLE:  # the sample has ended, and its slide may still lie there
            quality, gate = assess_frame(frame, self.bench.quality, self._gate)
            self._gate = replace(self._gate, last=gate.last)  # it learns from what is counted alone
            reason = FROZEN if frame.repeats_last else next(iter(quality.reasons), None)
        return "slide" if reason is None else "same" if reason in (FROZEN, UNCHANGED) else "nothing"

    def _begin_next(self, frame: Frame, desk: Desk) -> Outcome:
        """The frame as the first field of a new sample; the end of the one before is stored along."""
        begun = desk.next_slide(self.sample, self.bench.reporter)
        outcome = process_frame(frame, begun.sample, self.bench, read_clock(), self._gate, SlideMap(begun.sample.sid))
        return replace(
            outcome,
            drafts=(*begun.drafts, *outcome.drafts),
            documents=begun.documents,
            notes={**begun.notes, **outcome.notes},
        )

    def outcome_of(self, deed: Deed) -> Outcome:
        """What a command gives."""
        sample = self.sample if deed.sample is None else deed.sample
        outcome = Outcome(sample, None, deed.drafts, documents=deed.documents, notes=deed.notes or {})
        gate, drift = (GateMemory(), DriftMemory()) if deed.learns_anew else (self._gate, self._drift)
        if self.bench.drift is not None:
            drift = follow_end(drift, self.bench.drift, sample)
        if drift is self._drift:
            return outcome
        notes = {**outcome.notes, GATE_NOTE: gate_to_text(gate), DRIFT_NOTE: drift_to_text(drift)}
        return replace(outcome, notes=notes, gate=gate, drift=drift)

    def finish(self, reason: str) -> Outcome:
        """The end of the sample, with its report."""
        ending = self.bench.reporter.finish(self.sample, datetime.now(timezone.utc), reason)
        outcome = Outcome(ending.sample, None, ending.drafts, notes=ending.notes)
        return with_drift(outcome, self._drift, self.bench.drift)

    def is_drained(self, taken: object) -> bool:
        """Whether the sample was told to stop, and no frame from before is left. taken: the next of the queue."""
        if self.sample.phase != "finishing":
            return False
        return not (isinstance(taken, Frame) and taken.captured_monotonic_ns <= self._stopped_ns)

    def accept(self, outcome: Outcome) -> None:
        """It is stored: from now on the count stands there."""
        if outcome.sample.phase == "finishing" and self.sample.phase != "finishing":
            # Of a paused sample none: what is on its way was taken during the pause.
            self._stopped_ns = 0 if self.sample.phase == "paused" else time.monotonic_ns()
        is_next_sample = outcome.sample.sid != self.sample.sid
        self.sample = outcome.sample
        self._gate = outcome.gate or self._gate
        if is_next_sample and outcome.field is None:  # the field in view was counted for the one before
            self._gate = replace(self._gate, analysed=None)
        if outcome.drift is not None:
            self._drift = outcome.drift
            self._tell_drift()
        if outcome.trace is not None:
            self.slide.add(outcome.sample.sid, outcome.trace)
        self.slide.hold_answered(outcome.notes)

    def _tell_drift(self) -> None:
        plan = self.bench.drift
        self._health.drift(None if plan is None else read_drift(self._drift, plan))
