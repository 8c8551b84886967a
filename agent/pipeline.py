"""From a frame to stored results: the main path on one page. Newcomers start here, then read `agent.domain`.

    camera --Frame--> [ same as before? -> worth it? -> detect -> crop -> classify -> name -> count ] -----> outbox
             | no sample   | frozen           | refused                                      | enough: report     |
             +-------------+------------------+--- counted, marked as finished --------------+--------------------+

`process_frame` is that line and has no effect outside; `analyse_frame` is its middle, used by `hematovision infer` too.
`Pipeline` is the thread around it: it takes frames from the queue and stores what each one gave in one transaction, so
that a frame is either done with or has not been begun. Between two frames it does the commands that have come
(`agent.desk`). While the outbox cannot store, the frame in hand waits here, the queue behind it fills, and the camera
waits (or its newest frame wins): nothing that was counted is lost.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from dataclasses import field as with_default
from datetime import datetime, timezone
from types import MappingProxyType

from agent import systemd
from agent.analysis import placing
from agent.analysis.cells import count_cells, name_cell, place_on_slide, typical_red_cell_px
from agent.analysis.crops import cut_crop, encode_jpeg
from agent.analysis.differential import sum_areas
from agent.analysis.drift import DriftMemory, DriftPlan, follow_end, follow_field, read_drift
from agent.analysis.drift import from_text as drift_from_text
from agent.analysis.drift import to_text as drift_to_text
from agent.analysis.duplicates import Observation, SlideMap
from agent.analysis.preprocessing import preprocess
from agent.analysis.quality import UNCHANGED, GateMemory, assess_frame
from agent.analysis.quality import from_text as gate_from_text
from agent.analysis.quality import to_text as gate_to_text
from agent.analysis.sample import COUNTING, ENDED, reached_target
from agent.analysis.slide_change import Sight, SlideWatch
from agent.analysis.traces import Trace, trace_from_text, trace_to_text
from agent.bench import Bench
from agent.camera.camera import NOTHING_YET, UnreadableFrame
from agent.camera.grabber import END_OF_FRAMES, FROZEN, UNREADABLE, FrameQueue
from agent.delivery.audit import ChainHead, Entry, chain
from agent.delivery.commands import Command, InboundCommand, Refusal, reply_topic
from agent.delivery.messages import Body, Draft, RetainedDocument, Severity, event_draft, field_drafts
from agent.delivery.outbox import NO_NOTES, Outbox
from agent.delivery.reports import Reply, reply_body
from agent.delivery.topics import Topics
from agent.desk import Deed, Desk
from agent.domain import (
    CellStatus,
    ClockReading,
    FieldResult,
    Frame,
    FrameQuality,
    JoinedPart,
    SamplePhase,
    SampleState,
    SlidePlace,
)
from agent.errors import MessageRejected, OutboxDamaged, OutboxError
from agent.health import Health, SelfTest
from agent.latest import Latest
from agent.machine import read_clock, read_kernel_boot
from agent.pictures import PictureStore
from agent.reporting import ANSWERS, REVIEW, cell_key, kept_key, note_cells, tally_of
from agent.review import CropStore, is_of_gallery, read_kept_cells, review_key, review_notes

logger = logging.getLogger(__name__)

NOT_STORED = "not-stored"
"""Why a live frame is dropped that the outbox could not take before the agent was stopped."""

NO_SAMPLE = "no-sample"
"""Why a frame is dropped while no sample is open, or the open one is paused."""

UNSAYABLE = "unsayable"
"""Why a frame is dropped whose results JSON cannot say (a model that answers with no number)."""

TURN_S = 0.5
"""s; longest wait for a frame: a stop and an event are noticed within it."""

RETRY_S = 1.0
"""s; a disk that was full is tried again this often: soon enough for a person who has just made room."""

MOST_EVENTS_WAITING = 256
"""The newest events are kept while the outbox takes nothing; a camera that comes and goes each minute needs hours."""

TELL_AGAIN_S = 60.0
"""s; a live camera on a bad cable gives 25 unreadable pictures a second: each is counted, one a minute is told."""

GATE_NOTE = "gate"
"""The outbox's note of what the quality gate has learnt about this device."""

DRIFT_NOTE = "drift"
"""The outbox's note of what is usual on this device, and how far it has moved."""

SLIDE_NOTES = "slide/"
"""The outbox's notes of the current sample's newest fields, `slide/{sample}/{number of the field}`, from which the map
of its slide is made again after a restart; of as many as the map remembers (`placing.FIELDS_REMEMBERED`)."""

SERVED_THOUGH_FULL = frozenset({"stop"})
"""Commands that are done while a frame waits for room in the outbox, which keeps some for them."""

NOTES_AT_ONCE = 1024
"""Notes that are rewritten or go in one transaction: some 6 MB in the write-ahead log."""

START_PUT_OFF_S = 60
"""s; told with each NOTES_AT_ONCE of an older version, of which there may be 200,000, at 0.5 ms each."""

CELLS_NAMEABLE = 500_000
"""Of a sample's cells, red ones counted along, the newest so many can be named anew and stand in its review list: all
of ten thousand fields. Their notes stay below 200 MB even where the models know no cell."""

SEEN_NOTE = "slide-seen"
"""The outbox's note of when a slide was in view last; kept only where another slide begins a sample by itself."""

STAGES_OF_A_FRAME = ("capture", "quality", "preprocess", "detect", "crop", "classify", "total")
"""The keys of `timing_ms`, all of them in every field: a stage that had nothing to do took 0 ms."""


class Stopwatch:
    """Milliseconds by stage; a stage that is entered again adds up."""

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        self.timing_ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun_ns = self._now_ns()
        yield
        self.add(name, begun_ns)

    def add(self, name: str, begun_ns: int) -> None:
        """The stage has lasted from `begun_ns` until now."""
        self.timing_ms[name] = self.timing_ms.get(name, 0.0) + max(0, self._now_ns() - begun_ns) / 1e6


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one frame gave, to be stored as a whole.

    field: None for a frame that was dropped; `dropped` then says why. finished_key: its `origin_key`.
    documents: of the sample before, where this is the first frame of another slide. gate: what the quality gate
    remembers now; drift: what is known of the usual now; None = as before. trace: what the map of the slide keeps of
    the field.
    """

    sample: SampleState
    finished_key: str | None
    drafts: tuple[Draft, ...] = ()
    field: FieldResult | None = None
    dropped: str | None = None
    documents: tuple[RetainedDocument, ...] = ()
    notes: Mapping[str, str | None] = with_default(default_factory=lambda: NO_NOTES)
    gate: GateMemory | None = None
    trace: Trace | None = None
    drift: DriftMemory | None = None


def process_frame(
    frame: Frame,
    sample: SampleState,
    bench: Bench,
    clock: ClockReading,
    gate: GateMemory | None = None,
    slide: SlideMap | None = None,
    now_ns: Callable[[], int] = time.monotonic_ns,
) -> Outcome:
    """Everything that one frame gives: its field with all its cells, or the reason why it gives none.

    slide: the map of the sample's slide, which is only read; None = overlapping fields are not followed.
    """
    watch = Stopwatch(now_ns)
    watch.add("capture", frame.captured_monotonic_ns)
    if sample.phase not in COUNTING:
        return Outcome(sample, frame.origin_key, dropped=NO_SAMPLE)
    if frame.repeats_last or frame.sha256_16 == sample.last_sha256_16:
        return Outcome(refuse_frame(sample, FROZEN), frame.origin_key, dropped=FROZEN)
    seen = replace(sample, last_sha256_16=frame.sha256_16)
    with watch.stage("quality"):
        quality, gate = assess_frame(frame, bench.quality, gate or GateMemory())
    if not quality.is_accepted:
        refused = refuse_frame(seen, quality.reasons[0])
        return Outcome(refused, frame.origin_key, dropped=quality.reasons[0], gate=gate)
    field = analyse_frame(frame, quality, bench, sample, clock, watch)
    observed = None
    if slide is not None:
        field, observed = on_its_slide(field, slide, watch)
    drafts = field_drafts(field, bench.topics, sample.sid, with_cells=bench.with_cells, accession=sample.accession)
    counted = [cell for cell in field.cells if cell.is_counted is not False]
    notes: dict[str, str | None] = {**note_cells(sample.sid, counted, bench.counting.kinds)}
    notes |= review_notes(field, sample, bench.review, notes.keys())
    notes |= {cell_key(sample.sid, old): None for cell in field.cells for old in cell.supersedes}
    notes[GATE_NOTE] = gate_to_text(gate)
    if slide is not None and observed is not None:
        notes |= _slide_notes(sample, slide, observed.trace)
    outcome = Outcome(
        add_field(seen, field, bench.field_area_um2, 1.0 if observed is None else observed.new_share),
        frame.origin_key,
        drafts,
        field,
        notes=notes,
        gate=gate,
        trace=None if observed is None else observed.trace,
    )
    return stop_when_enough(outcome, bench, frame.captured_at)


def _slide_notes(sample: SampleState, slide: SlideMap, trace: Trace) -> dict[str, str | None]:
    """The trace of a field that follows those of `sample`; the field that the map forgets for it is forgotten too."""
    notes: dict[str, str | None] = {}
    if slide.places.count == 0:
        notes[SLIDE_NOTES] = None  # what an earlier sample left, or could not be read
    number = sample.fields + 1
    notes[_slide_key(sample.sid, number)] = trace_to_text(trace)
    if number > placing.FIELDS_REMEMBERED:
        notes[_slide_key(sample.sid, number - placing.FIELDS_REMEMBERED)] = None
    return notes


def _slide_key(sid: str, number: int) -> str:
    """number: of the field in its sample, from 1."""
    return f"{SLIDE_NOTES}{sid}/{number:07}"


def with_drift(outcome: Outcome, memory: DriftMemory, plan: DriftPlan | None) -> Outcome:
    """The outcome of a frame or of a sample's end, with what it says about the usual of this device."""
    if plan is None or (outcome.field is None and outcome.sample.phase not in ENDED):
        return outcome
    if outcome.field is not None:
        memory = follow_field(memory, plan, outcome.field, outcome.sample)
    memory = follow_end(memory, plan, outcome.sample)
    return replace(outcome, drift=memory, notes={**outcome.notes, DRIFT_NOTE: drift_to_text(memory)})


def on_its_slide(field: FieldResult, slide: SlideMap, watch: Stopwatch) -> tuple[FieldResult, Observation]:
    """The field with what it is on its slide, whose map is only read; the time for that is part of its total."""
    with watch.stage("place"):
        observed = slide.observe(field.frame, field.cells)
    took_ms, shift, join = watch.timing_ms["place"], observed.place.shift, observed.trace.join
    place = SlidePlace(
        observed.place.source,
        observed.place.part,
        shift.x,
        shift.y,
        math.degrees(shift.turn),
        observed.place.confidence,
        None if join is None else JoinedPart(join.part, join.shift.x, join.shift.y, math.degrees(join.shift.turn)),
    )
    is_dirt = {cell.cell_id for cell in observed.cells if cell.status is CellStatus.ARTEFACT}
    placed = replace(
        field,
        cells=observed.cells,
        counts=count_cells(cell for cell in field.cells if cell.cell_id not in is_dirt),
        unique_counts=observed.unique_counts,
        duplicates=observed.duplicates,
        place=place,
        timing_ms=MappingProxyType({**field.timing_ms, "place": took_ms, "total": field.timing_ms["total"] + took_ms}),
    )
    return placed, observed


def stop_when_enough(outcome: Outcome, bench: Bench, at: datetime) -> Outcome:
    """The outcome of a frame, with the sample finished and reported where it has as many cells as were asked for."""
    reason = reached_target(outcome.sample, tally_of(outcome.sample).counts, bench.counting.kinds)
    if reason is None:
        return outcome
    ending = bench.reporter.finish(outcome.sample, at, reason)
    drafts, notes = (*outcome.drafts, *ending.drafts), {**outcome.notes, **ending.notes}
    return replace(outcome, sample=ending.sample, drafts=drafts, notes=notes)


def analyse_frame(
    frame: Frame, quality: FrameQuality, bench: Bench, sample: SampleState, clock: ClockReading, watch: Stopwatch
) -> FieldResult:
    """Find the cells of a frame, name and count them. The cells' numbers go on from the sample's.

    watch: holds the stages before this one. Its `capture` is the time from the picture until it was taken up here,
    `total` the time from the picture to the result.
    """
    models = bench.models
    size_px = (frame.width_px, frame.height_px)
    classified = models.manifest.detector.classified
    with watch.stage("preprocess"):
        pixels_bgr = preprocess(frame.pixels_bgr, bench.preprocessing)
    with watch.stage("detect"):
        detections = models.detector.detect(pixels_bgr, bench.min_score)
    red_cell_px = typical_red_cell_px(detections, classified, size_px)
    cutter = models.cutter(pixels_bgr, detections)
    cells = []
    for number, detection in enumerate(detections, start=sample.next_cell_number):
        classification = None
        if detection.class_name in classified:
            with watch.stage("crop"):
                crop = cutter.around(detection.box)
            with watch.stage("classify"):
                classification = models.classifier.classify(crop)
        cells.append(
            name_cell(
                f"{sample.sid}-{number}",
                detection,
                classification,
                size_px,
                bench.rules,
                red_cell_px,
                place_on_slide(detection.box, frame.um_per_px, frame.stage_um),
            )
        )
    watch.add("total", frame.captured_monotonic_ns)
    return FieldResult(
        frame=frame,
        quality=quality,
        cells=tuple(cells),
        counts=count_cells(cells),
        unique_counts=MappingProxyType({}),
        duplicates=0,
        timing_ms=MappingProxyType({**dict.fromkeys(STAGES_OF_A_FRAME, 0.0), **watch.timing_ms}),
        provenance=bench.provenance,
        clock=clock,
    )


def add_field(
    sample: SampleState, field: FieldResult, area_um2: float | None = None, new_share: float = 1.0
) -> SampleState:
    """The sample with one field more.

    area_um2: of the field; None = from the calibration, where there is one. new_share: of it that was not seen before.
    """
    frame = field.frame
    if area_um2 is None and frame.um_per_px is not None:
        area_um2 = frame.width_px * frame.height_px * frame.um_per_px**2
    # The first field has nothing to be registered to, and nothing to be counted twice against.
    is_lost = sample.fields > 0 and field.place is not None and field.place.source == "unknown"
    return replace(
        sample,
        next_cell_number=sample.next_cell_number + len(field.cells),
        fields=sample.fields + 1,
        counts=_sum_counts(sample.counts, field.counts if field.place is None else field.unique_counts),
        area_um2=sum_areas(sample.area_um2, None if area_um2 is None else area_um2 * new_share),
        duplicates=sample.duplicates + field.duplicates,
        unplaced=sample.unplaced + is_lost,
        not_classed=sample.not_classed + sum(cell.status is CellStatus.ARTEFACT for cell in field.cells),
    )


def refuse_frame(sample: SampleState, reason: str) -> SampleState:
    """The sample with one more frame that was not analysed; while none is open it does not count."""
    if sample.phase not in COUNTING:
        return sample
    return replace(sample, refused=_sum_counts(sample.refused, {reason: 1}))


def _sum_counts(first: Mapping[str, int], second: Mapping[str, int]) -> Mapping[str, int]:
    """Class by class; `second` may be negative. Classes without a cell are left out."""
    return MappingProxyType(dict(sorted((Counter(first) + Counter(second)).items())))


@dataclass(frozen=True, slots=True, eq=False)
class Service:
    """Where commands come from and answers go. reply: topic, body, correlation; show: topic, JPEG bytes."""

    commands: queue.Queue[InboundCommand]
    desk: Desk
    reply: Callable[[str, Body, bytes | None], None]
    show: Callable[[str, bytes], None]


class Pipeline(threading.Thread):
    """The thread that owns the models, the sample and its own connection to the outbox.

    Make it, `start` it, `stop` it. failure: what ended it if that was neither `stop` nor the end of the source.
    is_source_finished: all frames of a finite source are done with. on_stored: called when there is more to publish.
    on_counted: called after each stored field. service: None = no commands are heard. crops: where pictures for the
    review are kept, pictures: where whole fields are; None = they are not. latest: where frames are shown to who looks
    on; None = nobody does. due_self_test: runs a self-test that is due and returns its outcome. While the newest one
    has failed, no frame is taken: a folder waits, of a live camera the newest frame stays.
    """

    def __init__(
        self,
        *,
        frames: FrameQueue,
        outbox: Outbox,
        bench: Bench,
        sample: SampleState,
        health: Health,
        on_stored: Callable[[], None] = lambda: None,
        on_counted: Callable[[], None] = lambda: None,
        service: Service | None = None,
        due_self_test: Callable[[], SelfTest | None] = lambda: None,
        documents_every_s: float = 5.0,
        retry_s: float = RETRY_S,
        crops: CropStore | None = None,
        pictures: PictureStore | None = None,
        latest: Latest | None = None,
    ) -> None:
        super().__init__(name="pipeline", daemon=True)
        self.failure: Exception | None = None
        self.is_source_finished = False
        self.sample = sample
        self._frames = frames
        self._outbox = outbox
        self._gate = gate_from_text(outbox.note(GATE_NOTE))
        self._drift = drift_from_text(outbox.note(DRIFT_NOTE))
        self._slide = _slide_from_notes(outbox, sample)
        self._hold_answered(outbox.notes(f"{ANSWERS}{sample.sid}/"))
        self._bench = bench
        self._health = health
        self._tell_drift()
        self._on_stored = on_stored
        self._on_counted = on_counted
        self._service = service
        self._due_self_test = due_self_test
        self._told_self_test = ""
        self._retry_s = retry_s
        self._crops = crops
        self._pictures = pictures
        self._latest = latest
        outbox.spare(self._let_a_picture_go)
        # Who has paused a sample or told it to stop says what comes next.
        self._slide_watch = watch_slides(bench, None if sample.phase in UNWATCHED else outbox.note(SEEN_NOTE))
        self._events: deque[Draft] = deque(maxlen=MOST_EVENTS_WAITING)
        self._memos: deque[tuple[str, str]] = deque(maxlen=MOST_EVENTS_WAITING)
        self._stopping = threading.Event()
        self._told_unreadable: tuple[str, float] = ("", 0.0)
        self._documents_every_s = documents_every_s
        self._told_sample: tuple[object, ...] = ()
        self._told_sample_at_s = -math.inf
        self._stopped_ns = 0  # when the sample was told to stop; frames taken before still belong to it
        self._wants_snapshot = False
        self._chain_head = read_chain_head(outbox)

    # ---- for other threads

    def tell(
        self, kind: str, message: str, severity: Severity = "info", detail: Mapping[str, object] | None = None
    ) -> None:
        """Have an event stored: something has happened now. It is, before the next frame."""
        self._events.append(_event(self._bench.topics, kind, message, severity, detail))

    def remember(self, key: str, value: str) -> None:
        """Have a note stored, before the next frame."""
        self._memos.append((key, value))

    def use_service(self, service: Service) -> None:
        """Hear commands; before the thread is started."""
        self._service = service

    def record(self, entry: Entry, notes: Mapping[str, str | None] = NO_NOTES) -> None:
        """Write an audit entry; before the thread is started. Raises OutboxError."""
        audit, head, chained = self._chained((entry,))
        self._outbox.append(audit, notes={**notes, **chained})
        self._chain_head = head

    def use_bench(self, bench: Bench) -> None:
        """Work with other models or thresholds from the next frame on; on this thread, or before it is started."""
        if bench.absence_s != self._bench.absence_s:
            self._slide_watch = watch_slides(bench)
        self._bench = bench
        self._tell_drift()

    def stop(self, timeout_s: float) -> bool:
        """Finish the frame in hand and end; the frames behind it are left. Returns whether it has ended in time."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout_s)
        return not self.is_alive()

    # ---- the thread

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # the top of the thread: the supervisor finds it dead and ends the process
            self.failure = error
            logger.exception("the pipeline has ended")

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._health.beat("pipeline")
            self._store_events()
            self._serve_commands()
            self._test_when_due()
            if self._health.is_self_test_failed:
                self._tell_sample()
                self._stopping.wait(TURN_S)
                continue
            taken = self._frames.take(TURN_S)
            self._finish_when_drained(taken)
            if taken is END_OF_FRAMES:
                self._end_of_source()
                break
            if taken is NOTHING_YET:
                self._tell_sample()
            elif isinstance(taken, UnreadableFrame):
                self._store(self._report_unreadable(taken))
            elif isinstance(taken, Frame):
                self._take_snapshot(taken)
                outcome = self._store_frame(taken)
                if self._latest is not None:
                    self._latest.show(taken, outcome.sample.sid, outcome.field, outcome.dropped)
        if self._slide_watch is not None and self._health.snapshot().outbox == "ok":  # else a frame was given up
            self.remember(SEEN_NOTE, self._slide_watch.note)
        self._store_events()

    def tell_self_test(self, test: SelfTest) -> None:
        """An event for the outcome; a failure that goes on in the same words is told once."""
        kind: tuple[str, Severity] = ("self-test", "info") if test.is_passed else ("self-test-failed", "error")
        if test.is_passed or test.detail != self._told_self_test:
            self.tell(kind[0], test.detail, kind[1])
        self._told_self_test = "" if test.is_passed else test.detail

    def _test_when_due(self) -> None:
        test = self._due_self_test()
        if test is not None:
            (logger.info if test.is_passed else logger.error)("%s", test.detail)
            self.tell_self_test(test)
            self._store_events()  # before a frame that is counted because of it

    def _store_frame(self, frame: Frame) -> Outcome:
        """Analyse a frame and store what it gave; a sample that is stopped while it waits makes it anew."""
        outcome = self._process(frame)
        while not self._has_stored(outcome):
            before = self.sample
            if not self._wait_for_room():
                return outcome
            if self.sample is not before:
                outcome = self._process(frame)
        self._mark_storing()
        return outcome

    def _process(self, frame: Frame) -> Outcome:
        if self._slide.sid != self.sample.sid or (self.sample.fields == 0 and self._slide.places.count > 0):
            self._slide = SlideMap(self.sample.sid)
        outcome = process_frame(frame, self.sample, self._bench, read_clock(), self._gate, self._slide)
        if self._shows_another_slide(frame, outcome):
            outcome = self._on_another_slide(frame)
        return with_drift(outcome, self._drift, self._bench.drift)

    def _tell_drift(self) -> None:
        plan = self._bench.drift
        self._health.drift(None if plan is None else read_drift(self._drift, plan))

    def _shows_another_slide(self, frame: Frame, outcome: Outcome) -> bool:
        """Whether the frame shows another slide than the sample's; false where nobody wants to know."""
        if self._slide_watch is None or self._service is None:
            return False
        if self.sample.phase in UNWATCHED:
            self._slide_watch.forget()
            return False
        reason = outcome.dropped
        if reason == NO_SAMPLE:  # the sample has ended, and its slide may still lie there
            quality, gate = assess_frame(frame, self._bench.quality, self._gate)
            self._gate = replace(self._gate, last=gate.last)  # it learns from what is counted alone
            reason = FROZEN if frame.repeats_last else next(iter(quality.reasons), None)
        sight: Sight = "slide" if reason is None else "same" if reason in (FROZEN, UNCHANGED) else "nothing"
        places = self._slide.places
        return self._slide_watch.is_another(frame.captured_monotonic_ns, sight, lambda: places.is_lost(frame))

    def _on_another_slide(self, frame: Frame) -> Outcome:
        """The frame as the first field of a new sample; the end of the one before is stored along."""
        service = self._service
        assert service is not None
        begun = service.desk.next_slide(self.sample, self._bench.reporter)
        outcome = process_frame(frame, begun.sample, self._bench, read_clock(), self._gate, SlideMap(begun.sample.sid))
        return replace(
            outcome,
            drafts=(*begun.drafts, *outcome.drafts),
            documents=begun.documents,
            notes={**begun.notes, **outcome.notes},
        )

    def _end_of_source(self) -> None:
        if self.sample.phase in ("running", "paused"):
            self._finish("source-ended")
        words = f"sample {self.sample.sid}: {self.sample.fields} fields"
        self.tell("source-ended", words, detail={"sample": self.sample.sid, "fields": self.sample.fields})
        self._store_events()
        self._health.retire("pipeline")
        self.is_source_finished = True

    # ---- the sample

    def _finish_when_drained(self, taken: object) -> None:
        """A sample that was told to stop is finished when no frame from before that is left."""
        if self.sample.phase != "finishing":
            return
        is_before = isinstance(taken, Frame) and taken.captured_monotonic_ns <= self._stopped_ns
        if not is_before:
            self._finish("command")

    def _finish(self, reason: str) -> None:
        ending = self._bench.reporter.finish(self.sample, datetime.now(timezone.utc), reason)
        ended = Outcome(ending.sample, None, ending.drafts, notes=ending.notes)
        self._store(with_drift(ended, self._drift, self._bench.drift))

    def _tell_sample(self) -> None:
        """While no frame comes: the documents that were not due with the last one."""
        documents = self._due_documents(self.sample)
        if documents:
            self._store(Outcome(self.sample, None))

    def _due_documents(self, sample: SampleState) -> tuple[RetainedDocument, ...]:
        """The sample's documents, at once when its phase or its report is new, else only every few seconds."""
        key = _sample_key(sample)
        is_new = key[:4] != self._told_sample[:4]
        is_due = time.monotonic() - self._told_sample_at_s >= self._documents_every_s
        if key == self._told_sample or not (is_new or is_due):
            return ()
        return self._bench.reporter.documents(sample, boot=self._outbox.boot, at=datetime.now(timezone.utc))

    def _note_told(self, sample: SampleState) -> None:
        self._told_sample, self._told_sample_at_s = _sample_key(sample), time.monotonic()

    def _take_snapshot(self, frame: Frame) -> None:
        if self._wants_snapshot and self._service is not None:
            self._wants_snapshot = False
            topic = self._bench.topics.image(self.sample.sid, f"frame-{frame.number}")
            self._service.show(topic, encode_jpeg(frame.pixels_bgr))

    # ---- commands

    def _serve_commands(self, *, can_store: bool = True) -> None:
        """Do the commands that have come, in their order."""
        if self._service is None:
            return
        while True:
            try:
                inbound = self._service.commands.get_nowait()
            except queue.Empty:
                return
            self._serve(inbound, self._service, can_store=can_store)

    def _serve(self, inbound: InboundCommand, service: Service, *, can_store: bool) -> None:
        judged = service.desk.judge(inbound)
        deed: Deed | None = None
        try:
            if isinstance(judged, Refusal):
                deed = service.desk.refuse(judged, self._bench.reporter)
            elif can_store or not judged.kind.is_audited or judged.name in SERVED_THOUGH_FULL:
                deed = service.desk.do(judged, self.sample, self._bench.reporter)
            else:
                deed = _not_stored(judged, "the outbox takes nothing now")
            if deed.must_be_stored and not can_store and judged.name in SERVED_THOUGH_FULL:
                self._append_deed(deed)
            elif deed.must_be_stored and can_store:
                # What has changed models or configuration is done; that it was must be stored, however long it takes.
                self._store_deed(deed, keeps_trying=deed.is_done_outside)
                self._mark_storing()
        except OutboxDamaged:
            raise
        except OutboxError as error:
            self._mark_stopped(error)
            # What reaches beyond the outbox was done before it could be recorded; the next start audits what it finds.
            is_done = deed is not None and deed.is_done_outside
            deed = _not_recorded(judged, str(error)) if is_done else _not_stored(judged, str(error))
        self._wants_snapshot |= deed.wants_snapshot
        body = reply_body(
            deed.reply,
            self._bench.topics,
            boot=self._outbox.boot,
            at=datetime.now(timezone.utc),
            is_repeated=deed.is_repeated,
        )
        if inbound.hear_reply is None:
            service.reply(reply_topic(inbound, self._bench.topics), body, inbound.correlation)
        else:
            inbound.hear_reply(body)

    def _store_deed(self, deed: Deed, *, keeps_trying: bool) -> None:
        """All that a command gives, in one transaction; raises OutboxError, unless it keeps trying."""
        while True:
            try:
                self._append_deed(deed)
            except OutboxDamaged:
                raise
            except OutboxError as error:
                if not keeps_trying or self._stopping.wait(self._retry_s):
                    raise
                self._mark_stopped(error)
                self._health.beat("pipeline")
            else:
                return

    def _append_deed(self, deed: Deed) -> None:
        entries = () if deed.entry is None else (deed.entry,)
        audit, head, notes = self._chained(entries)
        sample = self.sample if deed.sample is None else deed.sample
        gate, drift = (GateMemory(), DriftMemory()) if deed.learns_anew else (self._gate, self._drift)
        if self._bench.drift is not None:
            drift = follow_end(drift, self._bench.drift, sample)
        if drift is not self._drift:
            notes = {**notes, GATE_NOTE: gate_to_text(gate), DRIFT_NOTE: drift_to_text(drift)}
        documents = () if deed.sample is None else self._due_documents(sample)
        self._outbox.append(
            (*deed.drafts, *audit),
            sample=deed.sample,
            documents=(*deed.documents, *documents),
            notes={**(deed.notes or {}), **notes},
            answer=None if deed.answer_to is None else (deed.answer_to, deed.answer),
        )
        self._chain_head = head
        if sample.phase == "finishing" and self.sample.phase != "finishing":
            self._stopped_ns = time.monotonic_ns()
        self.sample = sample
        if drift is not self._drift:
            self._gate, self._drift = gate, drift
            self._tell_drift()
        self._hold_answered(deed.notes or {})
        if documents:
            self._note_told(sample)
        self._on_stored()

    def _hold_answered(self, notes: Mapping[str, str | None]) -> None:
        prefix = f"{ANSWERS}{self._slide.sid}/"
        named = [key.removeprefix(prefix) for key in notes if key.startswith(prefix) and key != prefix]
        if named:
            self._slide.hold(*named)

    def _chained(self, entries: Sequence[Entry]) -> tuple[tuple[Draft, ...], ChainHead, Mapping[str, str | None]]:
        """The audit messages of these entries, where the chain ends then, and the note that says so."""
        now = datetime.now(timezone.utc)
        drafts, head = chain(entries, self._chain_head, self._bench.topics, boot=self._outbox.boot, at=now)
        return drafts, head, {CHAIN_KEY: f"{head.n} {head.hash}"} if entries else NO_NOTES

    def _report_unreadable(self, unreadable: UnreadableFrame) -> Outcome:
        told_origin, told_at_s = self._told_unreadable
        if unreadable.origin == told_origin and time.monotonic() - told_at_s < TELL_AGAIN_S:
            return Outcome(refuse_frame(self.sample, UNREADABLE), unreadable.key, dropped=UNREADABLE)
        self._told_unreadable = (unreadable.origin, time.monotonic())
        logger.warning("frame unreadable: %s: %s", unreadable.origin, unreadable.reason)
        detail = {"origin": unreadable.origin, "reason": unreadable.reason}
        words = f"{unreadable.origin}: {unreadable.reason}"
        event = _event(self._bench.topics, "frame-unreadable", words, "warning", detail)
        return Outcome(refuse_frame(self.sample, UNREADABLE), unreadable.key, (event,), dropped=UNREADABLE)

    # ---- storing

    def _store(self, outcome: Outcome) -> None:
        """Store all that a frame gave, for as long as it takes; a stop while the outbox takes nothing gives it up."""
        while not self._has_stored(outcome):
            if not self._wait_for_room():
                return
        self._mark_storing()

    def _wait_for_room(self) -> bool:
        """Wait a little for an outbox that takes nothing, and answer commands; False = the thread is to end."""
        self._health.beat("pipeline")
        self._serve_commands(can_store=False)
        if self._stopping.wait(self._retry_s):
            logger.warning("stopped while the outbox takes nothing: the frame in hand is not stored")
            self._health.count_dropped(NOT_STORED)
            return False
        return True

    def _has_stored(self, outcome: Outcome) -> bool:
        try:
            self._append(outcome)
        except MessageRejected as error:
            return self._has_stored(self._report_unsayable(outcome, error))
        except OutboxDamaged:
            raise
        except OutboxError as error:
            self._mark_stopped(error)
            return False
        self.sample = outcome.sample
        self._gate = outcome.gate or self._gate
        if outcome.drift is not None:
            self._drift = outcome.drift
            self._tell_drift()
        if outcome.trace is not None:
            if self._slide.sid != outcome.sample.sid:
                self._slide = SlideMap(outcome.sample.sid)
            self._slide.add(outcome.trace)
        if outcome.field is not None:
            self._health.count_field(outcome.field.timing_ms)
            self._on_counted()
        if outcome.dropped is not None:
            self._health.count_dropped(outcome.dropped)
        if outcome.drafts:
            self._on_stored()
        if outcome.field is not None and self._bench.with_images and self._service is not None:
            for topic, jpeg in pictures_of(outcome.field, outcome.sample.sid, self._bench):
                self._service.show(topic, jpeg)
        if outcome.field is not None and self._crops is not None:
            self._keep_crops(outcome.field, outcome, self._crops)
        if outcome.field is not None and self._pictures is not None:
            self._pictures.keep(outcome.field.frame)
        return True

    def _keep_crops(self, field: FieldResult, outcome: Outcome, crops: CropStore) -> None:
        """The pictures of the cells of a stored field that are in the review list or the gallery."""
        sid = outcome.sample.sid
        margin = self._bench.models.manifest.classifier.crop.margin
        kept = [cell for cell in field.cells if outcome.notes.get(review_key(sid, cell.cell_id)) is not None]
        for cell in kept:
            crops.put(sid, cell.cell_id, encode_jpeg(cut_crop(field.frame.pixels_bgr, cell.detection.box, margin)))
        if outcome.sample.fields == 1:
            crops.keep_only((sid, *(key.removeprefix(kept_key("")) for key in self._outbox.notes(kept_key("")))))
        max_bytes = int(self._bench.review.max_mb * 2**20)
        if kept and crops.size_bytes() > max_bytes:
            listed = read_kept_cells(self._outbox.notes(REVIEW), self._outbox.notes(ANSWERS), None)
            crops.make_room(max_bytes, {cell.cell_id: not cell.is_open for cell in listed})

    def _let_a_picture_go(self) -> bool:
        """Whole fields before the cells that a person should look at; False = there are no pictures left."""
        is_gone = self._pictures is not None and self._pictures.let_go()
        return is_gone or (self._crops is not None and self._crops.let_go())

    def _append(self, outcome: Outcome) -> None:
        documents = (*outcome.documents, *self._due_documents(outcome.sample))
        if not outcome.drafts and outcome.finished_key is None and not documents:
            return  # a live frame that gave nothing need not wear the disk
        keys = () if outcome.finished_key is None else (outcome.finished_key,)
        more = 0 if outcome.field is None else len(outcome.field.cells)
        seen = {} if self._slide_watch is None else {SEEN_NOTE: self._slide_watch.note}
        self._outbox.append(
            outcome.drafts,
            sample=outcome.sample,
            finished_keys=keys,
            documents=documents,
            notes={**_notes_of_old_cells(self._outbox, outcome.sample, more), **outcome.notes, **seen},
        )
        if documents:
            self._note_told(outcome.sample)
            if not outcome.drafts:
                self._on_stored()

    def _report_unsayable(self, outcome: Outcome, error: MessageRejected) -> Outcome:
        logger.error("a field cannot be stored: %s", error)
        event = _event(self._bench.topics, "field-rejected", str(error), "error", {"frame": outcome.finished_key})
        return Outcome(self.sample, outcome.finished_key, (event,), dropped=UNSAYABLE)

    def _mark_stopped(self, error: OutboxError) -> None:
        if self._health.snapshot().outbox == "stopped":
            return
        logger.error("outbox stopped, intake waits: %s", error)
        self._health.outbox_state("stopped", str(error))
        self.tell("outbox-stopped", str(error), "error")
        self._store_events()  # a full outbox keeps a little room for saying so

    def _mark_storing(self) -> None:
        if self._health.snapshot().outbox == "ok":
            return
        logger.info("outbox stores again, intake goes on")
        self._health.outbox_state("ok")
        self.tell("outbox-recovered", "results are stored again; none was lost")

    def _store_events(self) -> None:
        """Store the notes and events that wait, in order; those that the outbox does not take now wait on."""
        self._store_memos()
        while self._events:
            event = self._events[0]
            try:
                self._outbox.append((event,))
            except OutboxDamaged:
                raise
            except OutboxError as error:
                logger.debug("event waits: %s", error)
                return
            self._on_stored()
            if self._events[0] is event:  # else a newer one has pushed it out meanwhile
                self._events.popleft()

    def _store_memos(self) -> None:
        while self._memos:
            key, value = self._memos[0]
            try:
                self._outbox.append((), notes={key: value})
            except OutboxDamaged:
                raise
            except OutboxError as error:
                logger.debug("note waits: %s", error)
                return
            self._memos.popleft()


UNWATCHED: frozenset[SamplePhase] = frozenset({"idle", "paused", "finishing"})
"""In these phases of the sample a person decides which slide comes next."""


def watch_slides(bench: Bench, before: str | None = None) -> SlideWatch | None:
    """What recognises another slide; None where only commands begin samples. before: its note of the last run."""
    return None if bench.absence_s is None else SlideWatch(bench.absence_s, before, read_kernel_boot())


def _slide_from_notes(outbox: Outbox, sample: SampleState) -> SlideMap:
    """The map of the sample's slide as it was after the last stored field.

    A version before this one has kept a note of every field, and no trace of it says what the map knew before: its
    notes are read once, and written again as this one keeps them.
    """
    slide = SlideMap(sample.sid)
    if not sample.fields:
        return slide
    first = _slide_key(sample.sid, max(1, sample.fields + 1 - placing.FIELDS_REMEMBERED))
    completed: list[tuple[str, str | None]] = []
    forgotten: list[tuple[str, str | None]] = []
    try:
        for key, text in outbox.each_note(f"{SLIDE_NOTES}{sample.sid}/"):
            trace = trace_from_text(text)
            if len(forgotten) % NOTES_AT_ONCE == 1:
                systemd.extend_start(START_PUT_OFF_S)
            if key < first:
                forgotten.append((key, None))
            elif trace.before is None:
                completed.append((key, trace_to_text(replace(trace, before=slide.before(trace)))))
            slide.add(trace, is_seen=False)
        slide.places.see()
    except ValueError as error:
        logger.error("the map of sample %s cannot be read, it begins anew: %s", sample.sid, error)  # noqa: TRY400
        return SlideMap(sample.sid)
    changed = [*completed, *forgotten]  # in this order: until all are complete none is missing
    try:
        for begin in range(0, len(changed), NOTES_AT_ONCE):
            systemd.extend_start(START_PUT_OFF_S)
            outbox.append((), notes=dict(changed[begin : begin + NOTES_AT_ONCE]))
    except OutboxDamaged:
        raise
    except OutboxError as error:
        logger.warning("the notes of sample %s stay as an older version wrote them: %s", sample.sid, error)
    return slide


def _notes_of_old_cells(outbox: Outbox, sample: SampleState, more: int) -> dict[str, str | None]:
    """What goes of the oldest cells when so many more have come; the gallery stays, and what persons have said.

    sample: with the new cells.
    """
    end = sample.next_cell_number - CELLS_NAMEABLE
    notes: dict[str, str | None] = {}
    for number in range(max(1, end - more), end):
        cell_id = f"{sample.sid}-{number}"
        notes[cell_key(sample.sid, cell_id)] = None
        listed = outbox.note(key := review_key(sample.sid, cell_id))
        if listed is not None and not is_of_gallery(listed):
            notes[key] = None
    return notes


CHAIN_KEY = "audit/head"
"""Note: number and hash of the last entry of the audit chain."""


def read_chain_head(outbox: Outbox) -> ChainHead:
    """Where the audit chain of this outbox ends."""
    n, _, digest = (outbox.note(CHAIN_KEY) or "").partition(" ")
    return ChainHead(int(n), digest) if digest else ChainHead()


def pictures_of(field: FieldResult, sid: str, bench: Bench) -> Iterator[tuple[str, bytes]]:
    """Topic and JPEG bytes of each cell of a field that went to the classifier."""
    margin = bench.models.manifest.classifier.crop.margin
    for cell in field.cells:
        if cell.classification is not None:
            crop = cut_crop(field.frame.pixels_bgr, cell.detection.box, margin)
            yield bench.topics.image(sid, cell.cell_id), encode_jpeg(crop)


def _sample_key(sample: SampleState) -> tuple[object, ...]:
    """What its documents depend on; the first four change seldom and are told at once."""
    return sample.sid, sample.phase, sample.reports, sample.amendments, sample.fields


def _not_stored(judged: Command | Refusal, reason: str) -> Deed:
    message = f"nothing was done: {reason}; send it again, as another transaction, when the alert is gone"
    return Deed(Reply(judged.name, judged.transaction, "failed", "outbox-stopped", message, {}))


def _not_recorded(judged: Command | Refusal, reason: str) -> Deed:
    message = f"it was done, and could not be recorded: {reason}"
    return Deed(Reply(judged.name, judged.transaction, "failed", "not-recorded", message, {}))


def _event(
    topics: Topics, kind: str, message: str, severity: Severity, detail: Mapping[str, object] | None = None
) -> Draft:
    return event_draft(kind, message, topics, at=datetime.now(timezone.utc), severity=severity, detail=detail)
