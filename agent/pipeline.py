"""From a frame to stored results: the main path on one page. Newcomers start here, then read `agent.domain`.

    camera --Frame--> [ same as before? -> sharp and lit? -> detect -> crop -> classify -> name -> count ] --> outbox
                           | frozen             | refused                                                       |
                           +--------------------+--- counted, marked as finished -------------------------------+

`process_frame` is that line and has no effect outside; `analyse_frame` is its middle, used by `hematovision infer` too.
`Pipeline` is the thread around it: it takes frames from the queue and stores what each one gave in one transaction, so
that a frame is either done with or has not been begun. While the outbox cannot store, the frame in hand waits here, the
queue behind it fills, and the camera waits (or its newest frame wins): nothing that was counted is lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from types import MappingProxyType

import agent
from agent.analysis.cells import NamingRules, count_cells, name_cell, place_on_slide, typical_red_cell_px
from agent.analysis.crops import cut_crop
from agent.analysis.quality import assess_quality
from agent.camera.camera import NOTHING_YET, UnreadableFrame
from agent.camera.grabber import END_OF_FRAMES, FROZEN, UNREADABLE, FrameQueue
from agent.config import Config, QualitySection, config_sha256
from agent.delivery.messages import Draft, Severity, event_draft, field_drafts
from agent.delivery.outbox import Outbox
from agent.delivery.topics import Topics
from agent.domain import ClockReading, FieldResult, Frame, FrameQuality, Provenance, SampleState
from agent.errors import MessageRejected, OutboxDamaged, OutboxError
from agent.health import Health
from agent.inference.models import Models
from agent.machine import read_clock

logger = logging.getLogger(__name__)

NOT_STORED = "not-stored"
"""Why a live frame is dropped that the outbox could not take before the agent was stopped."""

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

STAGES_OF_A_FRAME = ("capture", "quality", "detect", "crop", "classify", "total")
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
class Bench:
    """What every frame is worked with: the models, the thresholds, the names that go into its messages."""

    models: Models
    quality: QualitySection
    min_score: float | None
    rules: NamingRules
    provenance: Provenance
    topics: Topics
    with_cells: bool


def make_bench(config: Config, models: Models) -> Bench:
    """The bench that the configuration asks for."""
    return Bench(
        models=models,
        quality=config.quality,
        min_score=config.models.min_score,
        rules=models.naming_rules(config.models.min_probability),
        provenance=Provenance(
            agent_version=agent.__version__,
            detector=models.detector.identity,
            classifier=models.classifier.identity,
            runtime=models.runtime,
            delegate=models.delegate,
            config_sha256=config_sha256(config),
        ),
        topics=Topics(config.site, config.device),
        with_cells=config.publish.cells,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one frame gave, to be stored as a whole.

    field: None for a frame that was dropped; `dropped` then says why. finished_key: its `origin_key`.
    """

    sample: SampleState
    finished_key: str | None
    drafts: tuple[Draft, ...] = ()
    field: FieldResult | None = None
    dropped: str | None = None


def process_frame(
    frame: Frame, sample: SampleState, bench: Bench, clock: ClockReading, now_ns: Callable[[], int] = time.monotonic_ns
) -> Outcome:
    """Everything that one frame gives: its field with all its cells, or the reason why it gives none."""
    watch = Stopwatch(now_ns)
    watch.add("capture", frame.captured_monotonic_ns)
    if frame.repeats_last or frame.sha256_16 == sample.last_sha256_16:
        return Outcome(sample, frame.origin_key, dropped=FROZEN)
    seen = replace(sample, last_sha256_16=frame.sha256_16)
    with watch.stage("quality"):
        quality = assess_quality(frame.pixels_bgr, bench.quality)
    if not quality.is_accepted:
        return Outcome(seen, frame.origin_key, dropped=quality.reasons[0])
    field = analyse_frame(frame, quality, bench, sample, clock, watch)
    drafts = field_drafts(field, bench.topics, sample.sid, with_cells=bench.with_cells)
    return Outcome(add_field(seen, field), frame.origin_key, drafts, field)


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
    with watch.stage("detect"):
        detections = models.detector.detect(frame.pixels_bgr, bench.min_score)
    red_cell_px = typical_red_cell_px(detections, classified, size_px)
    cells = []
    for number, detection in enumerate(detections, start=sample.next_cell_number):
        classification = None
        if detection.class_name in classified:
            with watch.stage("crop"):
                crop = cut_crop(frame.pixels_bgr, detection.box, models.manifest.classifier.crop.margin)
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


def add_field(sample: SampleState, field: FieldResult) -> SampleState:
    """The sample with one field more."""
    return replace(
        sample,
        next_cell_number=sample.next_cell_number + len(field.cells),
        fields=sample.fields + 1,
        counts=_sum_counts(sample.counts, field.counts),
    )


def _sum_counts(first: Mapping[str, int], second: Mapping[str, int]) -> Mapping[str, int]:
    return MappingProxyType(dict(sorted((Counter(first) + Counter(second)).items())))


class Pipeline(threading.Thread):
    """The thread that owns the models, the sample and its own connection to the outbox.

    Make it, `start` it, `stop` it. failure: what ended it if that was neither `stop` nor the end of the source.
    is_source_finished: all frames of a finite source are done with. on_stored: called when there is more to publish.
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
        retry_s: float = RETRY_S,
    ) -> None:
        super().__init__(name="pipeline", daemon=True)
        self.failure: Exception | None = None
        self.is_source_finished = False
        self.sample = sample
        self._frames = frames
        self._outbox = outbox
        self._bench = bench
        self._health = health
        self._on_stored = on_stored
        self._retry_s = retry_s
        self._events: deque[Draft] = deque(maxlen=MOST_EVENTS_WAITING)
        self._stopping = threading.Event()
        self._told_unreadable: tuple[str, float] = ("", 0.0)

    # ---- for other threads

    def tell(
        self, kind: str, message: str, severity: Severity = "info", detail: Mapping[str, object] | None = None
    ) -> None:
        """Have an event stored: something has happened now. It is, before the next frame."""
        self._events.append(_event(self._bench.topics, kind, message, severity, detail))

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
            taken = self._frames.take(TURN_S)
            if taken is END_OF_FRAMES:
                words = f"sample {self.sample.sid}: {self.sample.fields} fields"
                self.tell("source-ended", words, detail={"sample": self.sample.sid, "fields": self.sample.fields})
                self._store_events()
                self.is_source_finished = True
                break
            if taken is NOTHING_YET:
                continue
            if isinstance(taken, UnreadableFrame):
                self._store(self._report_unreadable(taken))
            else:
                self._store(process_frame(taken, self.sample, self._bench, read_clock()))
        self._store_events()

    def _report_unreadable(self, unreadable: UnreadableFrame) -> Outcome:
        told_origin, told_at_s = self._told_unreadable
        if unreadable.origin == told_origin and time.monotonic() - told_at_s < TELL_AGAIN_S:
            return Outcome(self.sample, unreadable.key, dropped=UNREADABLE)
        self._told_unreadable = (unreadable.origin, time.monotonic())
        logger.warning("frame unreadable: %s: %s", unreadable.origin, unreadable.reason)
        detail = {"origin": unreadable.origin, "reason": unreadable.reason}
        words = f"{unreadable.origin}: {unreadable.reason}"
        event = _event(self._bench.topics, "frame-unreadable", words, "warning", detail)
        return Outcome(self.sample, unreadable.key, (event,), dropped=UNREADABLE)

    # ---- storing

    def _store(self, outcome: Outcome) -> None:
        """Store all that a frame gave, for as long as it takes; a stop while the outbox takes nothing gives it up."""
        while not self._has_stored(outcome):
            self._health.beat("pipeline")
            if self._stopping.wait(self._retry_s):
                logger.warning("stopped while the outbox takes nothing: the frame in hand is not stored")
                self._health.count_dropped(NOT_STORED)
                return
        self._mark_storing()

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
        if outcome.field is not None:
            self._health.count_field(outcome.field.timing_ms)
        if outcome.dropped is not None:
            self._health.count_dropped(outcome.dropped)
        if outcome.drafts:
            self._on_stored()
        return True

    def _append(self, outcome: Outcome) -> None:
        if not outcome.drafts and outcome.finished_key is None:
            return  # a live frame that gave nothing need not wear the disk
        keys = () if outcome.finished_key is None else (outcome.finished_key,)
        self._outbox.append(outcome.drafts, sample=outcome.sample, finished_keys=keys)

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
        """Store the events that wait, in order; those that the outbox does not take now wait on."""
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


def _event(
    topics: Topics, kind: str, message: str, severity: Severity, detail: Mapping[str, object] | None = None
) -> Draft:
    return event_draft(kind, message, topics, at=datetime.now(timezone.utc), severity=severity, detail=detail)
