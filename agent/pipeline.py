"""From a frame to stored results: the main path on one page. Newcomers start here, then read `agent.domain`.

    camera --Frame--> [ same as before? -> worth it? -> detect -> crop -> classify -> name -> count ] -----> outbox
             | no sample   | frozen           | refused                                      | enough: report     |
             +-------------+------------------+--- counted, marked as finished --------------+--------------------+

`process_frame` is that line and has no effect outside; `analyse_frame` is its middle, used by `hematovision infer` too.
The thread around it is `agent.counting.thread`: it takes frames from the queue and stores what each one gave in one
transaction, so that a frame is either done with or has not been begun.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from dataclasses import field as with_default
from datetime import datetime
from types import MappingProxyType

from agent.analysis.cells import count_cells, name_cell, place_on_slide, typical_red_cell_px
from agent.analysis.differential import sum_areas
from agent.analysis.drift import DriftMemory, DriftPlan, follow_end, follow_field
from agent.analysis.drift import to_text as drift_to_text
from agent.analysis.duplicates import Observation, SlideMap
from agent.analysis.preprocessing import preprocess
from agent.analysis.quality import GateMemory, assess_frame
from agent.analysis.quality import to_text as gate_to_text
from agent.analysis.sample import COUNTING, ENDED, reached_target
from agent.analysis.traces import Trace
from agent.bench import Bench
from agent.camera.grabber import FROZEN
from agent.delivery.messages import Draft, RetainedDocument, field_drafts
from agent.domain import (
    CellStatus,
    ClockReading,
    FieldResult,
    Frame,
    FrameQuality,
    JoinedPart,
    SampleState,
    SlidePlace,
)
from agent.reporting import cell_key, note_cells, tally_of
from agent.review import review_notes
from agent.slide_notes import note_trace

NO_SAMPLE = "no-sample"
"""Why a frame is dropped while no sample is open, or the open one is paused."""

GATE_NOTE = "gate"
"""The outbox's note of what the quality gate has learnt about this device."""

DRIFT_NOTE = "drift"
"""The outbox's note of what is usual on this device, and how far it has moved."""

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
    """What one frame gave, or a command, or the end of a sample; to be stored as a whole.

    field: None for a frame that was dropped; `dropped` then says why. finished_key: the frame's `origin_key`.
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
    notes: Mapping[str, str | None] = with_default(default_factory=dict)
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
        notes |= note_trace(sample, slide, observed.trace)
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


def stop_when_enough(outcome: Outcome, bench: Bench, at: datetime) -> Outcome:
    """The outcome of a frame, with the sample finished and reported where it has as many cells as were asked for."""
    reason = reached_target(outcome.sample, tally_of(outcome.sample).counts, bench.counting.kinds)
    if reason is None:
        return outcome
    ending = bench.reporter.finish(outcome.sample, at, reason)
    drafts, notes = (*outcome.drafts, *ending.drafts), {**outcome.notes, **ending.notes}
    return replace(outcome, sample=ending.sample, drafts=drafts, notes=notes)


def with_drift(outcome: Outcome, memory: DriftMemory, plan: DriftPlan | None) -> Outcome:
    """The outcome of a frame or of a sample's end, with what it says about the usual of this device."""
    if plan is None or (outcome.field is None and outcome.sample.phase not in ENDED):
        return outcome
    if outcome.field is not None:
        memory = follow_field(memory, plan, outcome.field, outcome.sample)
    memory = follow_end(memory, plan, outcome.sample)
    return replace(outcome, drift=memory, notes={**outcome.notes, DRIFT_NOTE: drift_to_text(memory)})


def _sum_counts(first: Mapping[str, int], second: Mapping[str, int]) -> Mapping[str, int]:
    """Class by class; `second` may be negative. Classes without a cell are left out."""
    return MappingProxyType(dict(sorted((Counter(first) + Counter(second)).items())))
