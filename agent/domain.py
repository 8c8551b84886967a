"""The nouns of the agent: frozen values that walk from the camera to the broker.

Coordinates are frame pixels, x to the right, y downwards, the origin at the outer corner of the upper left pixel.
Times are UTC datetimes (`_at`) or monotonic readings (`_monotonic_ns`). Class names come from the model manifest;
no name of a cell class stands in this package's code.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""uint8, shape (height, width, 3), colour order B G R, C-contiguous, read-only once it stands in a `Frame`."""

NOTHING: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-parallel rectangle in frame pixels; `x_min < x_max`, `y_min < y_max`."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @property
    def width_px(self) -> float:
        return self.x_max - self.x_min

    @property
    def height_px(self) -> float:
        return self.y_max - self.y_min

    @property
    def centre_px(self) -> tuple[float, float]:
        return (self.x_min + self.x_max) / 2, (self.y_min + self.y_max) / 2


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One picture from a camera, decoded.

    number: from 1, without gaps, within one opening of the camera.
    sha256: of the shape and the pixel bytes as they were decoded, 64 hex digits.
    source: where it came from, for people: a path, an address, `simulated`.
    origin_key: names a stored frame across restarts (a file's path, size and time; a position in a video); None when
        the frame can never be read again.
    stage_um: place of the frame's upper left corner on the slide (x, y), where the stage tells.
    repeats_last: byte for byte the same picture as the one before it from this camera.
    """

    number: int
    pixels_bgr: Pixels
    captured_at: datetime
    captured_monotonic_ns: int
    sha256: str
    source: str
    origin_key: str | None = None
    um_per_px: float | None = None
    stage_um: tuple[float, float] | None = None
    repeats_last: bool = False

    @property
    def sha256_16(self) -> str:
        """The first 16 digits: enough to know a repeat."""
        return self.sha256[:16]

    @property
    def width_px(self) -> int:
        return int(self.pixels_bgr.shape[1])

    @property
    def height_px(self) -> int:
        return int(self.pixels_bgr.shape[0])


@dataclass(frozen=True, slots=True)
class FrameColour:
    """The colours of a frame, in the order B, G, R.

    ground_bgr: mean grey levels where no cell lies, 1 to 255. stain_od_bgr: mean optical density of what is darker than
    the ground, 0 = as the ground; None where nothing is.
    """

    ground_bgr: tuple[float, float, float]
    stain_od_bgr: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class FrameQuality:
    """The gate's verdict on a frame (`agent.analysis.quality`).

    focus: fine detail in thousandths of coarse detail, at the edges of cells. clipped_pct: 0 to 100. colour: None
    where it was not looked at.
    """

    is_accepted: bool
    reasons: tuple[str, ...]
    focus: float
    clipped_pct: float
    colour: FrameColour | None = None


@dataclass(frozen=True, slots=True)
class Detection:
    """One box of the detector. score: 0 to 1."""

    box: Box
    class_name: str
    score: float


@dataclass(frozen=True, slots=True)
class Attribute:
    """What a cell looks like in one respect. probability: 0 to 1."""

    value: str
    probability: float


NO_MORPHOLOGY: Mapping[str, Attribute] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Classification:
    """The classifier's answer for one crop. probabilities: by class name, in the manifest's order, sum 1.

    cell_probability: that the crop shows a cell that has a name at all, 0 to 1; 1 where the model does not say.
    morphology: by attribute; empty where the model does not say.
    """

    class_name: str
    probability: float
    probabilities: Mapping[str, float]
    cell_probability: float = 1.0
    morphology: Mapping[str, Attribute] = field(default_factory=lambda: NO_MORPHOLOGY)

    @property
    def margin(self) -> float:
        """Distance of the first from the second probability, 0 to 1."""
        first, second, *_ = sorted((*self.probabilities.values(), 0.0, 0.0), reverse=True)
        return first - second


class CellStatus(str, enum.Enum):
    """What a cell's line counts for. Only `ACCEPTED` and `EDGE` carry a class that is counted."""

    ACCEPTED = "accepted"
    UNIDENTIFIED = "unidentified"
    EDGE = "edge"
    DUPLICATE = "duplicate"
    ARTEFACT = "artefact"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a field. classification is None where the detector alone names the cell (mature red cells).

    is_counted: whether this view stands for its cell in the slide's unique counts; None where that is not followed.
    supersedes: ids of views that stood for it before and no longer do.
    """

    cell_id: str
    detection: Detection
    class_name: str
    probability: float
    classification: Classification | None
    status: CellStatus
    slide_um: tuple[float, float] | None = None
    duplicate_of: str | None = None
    is_counted: bool | None = None
    supersedes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model answered. sha256: 64 hex digits of the file."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Software:
    """What computed, besides the agent and the models' runtime. machine: the processor's kind, as `aarch64`."""

    machine: str
    python: str
    numpy: str
    opencv: str


@dataclass(frozen=True, slots=True)
class Thresholds:
    """From when on something is a cell, and has a name; 0 to 1, as they were in force.

    rules_sha256: 64 hex digits of all that manifest and configuration say of the way from a frame to named cells.
    """

    min_score: float
    min_probability: float
    min_cell_probability: float
    rules_sha256: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """All that is needed to get the same answer again from the same frame.

    software, thresholds: None in what was kept by an agent that did not tell them.
    """

    agent_version: str
    detector: ModelIdentity
    classifier: ModelIdentity
    runtime: str
    delegate: str
    config_sha256: str
    software: Software | None = None
    thresholds: Thresholds | None = None


@dataclass(frozen=True, slots=True)
class ClockReading:
    """Whether the system clock follows a reference. offset_ms is None where the system does not say."""

    is_synchronised: bool
    offset_ms: float | None = None


@dataclass(frozen=True, slots=True)
class JoinedPart:
    """A part that was found to be one with another: where its origin lies in that one, frame pixels and degrees."""

    part: int
    x_px: float
    y_px: float
    turn_deg: float


@dataclass(frozen=True, slots=True)
class SlidePlace:
    """Where a field lies on its slide: its upper left corner and turn within a part, in frame pixels and degrees.

    part: fields of one part lie in one system of coordinates; a field at an unknown place begins a new part.
    confidence: 0 to 1, how well the overlapping pictures agree; 1 where the stage tells. joins: the part that this
        field shows to be one with its own.
    """

    source: Literal["stage", "registered", "unknown"]
    part: int
    x_px: float
    y_px: float
    turn_deg: float
    confidence: float
    joins: JoinedPart | None = None


@dataclass(frozen=True, slots=True, eq=False)
class FieldResult:
    """All that one accepted frame gave. timing_ms: by stage name (capture, quality, detect, crop, classify, total).

    counts: cells of this field by class, seen before or not, with the key `unidentified` for cells without a trusted
        class.
    unique_counts: what the field adds to the slide's counts of each cell once; may be negative, see
        `agent.analysis.duplicates`. place: None where overlapping fields are not followed (single pictures).
    """

    frame: Frame
    quality: FrameQuality
    cells: tuple[Cell, ...]
    counts: Mapping[str, int]
    unique_counts: Mapping[str, int]
    duplicates: int
    timing_ms: Mapping[str, float]
    provenance: Provenance
    clock: ClockReading
    place: SlidePlace | None = None


AgeBand = Literal["newborn", "infant", "child", "adolescent", "adult", "elder"]
"""The only thing that the agent is told of a person. newborn: to 28 days; infant: to 23 months; child: to 10 years;
adolescent: to 17 years; adult: to 64 years; elder: from 65 years."""


@dataclass(frozen=True, slots=True)
class ReferenceInterval:
    """What is usual for one class and age band, in % of the leukocytes, and who says so."""

    class_name: str
    age_band: AgeBand
    low_pct: float
    high_pct: float
    source: str


SamplePhase = Literal["idle", "running", "paused", "finishing", "finished", "aborted"]
"""Where a sample is in its life; what leads from one to the next stands in `agent.analysis.sample`."""


@dataclass(frozen=True, slots=True)
class SampleState:
    """Where the counting of one sample stands; stored in the same transaction as the field that changed it.

    sid: the sample's id in topics. next_cell_number: the number of the next cell's id.
    last_sha256_16: hash of the last frame taken in, so that a repeat is known after a restart too.
    number: how many samples this outbox had begun with it, whatever the clock said; None where a version before this
    one has begun it.
    accession: the laboratory's opaque token; with age_band all that is told of a person.
    opened_at, ended_at: RFC 3339. end_reason: in a word, why it ends. reports: final and amended differentials so far;
    amendments: how often a person gave a cell another name, the same cell perhaps more than once.
    target_cells: nucleated cells, target_half_width_pct: % points, at which it stops by itself; None = it does not.
    counts: each cell of the slide once, by class. duplicates: views of cells that were counted before.
    unplaced: fields at an unknown place, but for the first: a cell of them may have been counted twice unnoticed.
    area_um2: of all that was seen, overlaps once; None once a field of unknown size was counted.
    not_classed: cells seen and never named. refused: frames that were not analysed while it was open, by
        reason; after a power cut those since the last stored field are missing.
    """

    sid: str
    next_cell_number: int = 1
    fields: int = 0
    counts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    last_sha256_16: str | None = None
    phase: SamplePhase = "running"
    accession: str | None = None
    age_band: AgeBand | None = None
    opened_at: str | None = None
    ended_at: str | None = None
    end_reason: str | None = None
    target_cells: int | None = None
    target_half_width_pct: float | None = None
    reports: int = 0
    amendments: int = 0
    area_um2: float | None = 0.0
    not_classed: int = 0
    duplicates: int = 0
    unplaced: int = 0
    refused: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    number: int | None = None


@dataclass(frozen=True, slots=True)
class FigureReading:
    """One watched figure in its own unit: what is usual, what it is now, and between what it may lie.

    unit: in words. moved: a sentence about the shift while there is one.
    """

    usual: float
    now: float
    low: float
    high: float
    unit: str
    moved: str | None = None


@dataclass(frozen=True, slots=True)
class DriftReading:
    """From how many slides the usual is learnt, and the figures that are watched, by name (`agent.analysis.drift`)."""

    slides: int
    of_slides: int
    figures: Mapping[str, FigureReading]


class AgentState(str, enum.Enum):
    """The words of the `state` topic. `LOST` is only ever said by the broker, from the Will."""

    INIT = "init"
    READY = "ready"
    DEGRADED = "degraded"
    SLEEPING = "sleeping"
    STOPPING = "stopping"
    DISCONNECTED = "disconnected"
    LOST = "lost"
