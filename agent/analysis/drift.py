"""Whether this device still sees what it used to see: which figures are watched, and what is said when one moves.

    fields of a slide --SlideTally--> one value of each figure --follow--> its chart --> DriftReading

The unit is the slide. Ten fields of one smear say the same thing ten times over, and the next smear, thicker, stained
on another day, of another person, says another without any fault: between single fields the usual spread would look
far too small. A change of lamp, lens or stain lasts over slides; a gross one within a slide is the gate's
(`agent.analysis.quality`). Statistics: `agent.analysis.control_charts`; reasons: docs/decisions/0007-drift-by-slide.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from types import MappingProxyType
from typing import Final, Literal

from agent.analysis.cells import UNIDENTIFIED
from agent.analysis.control_charts import Chart, Plan, Shift, follow
from agent.analysis.quality import cast_of
from agent.config import CameraSection, Config
from agent.domain import CellStatus, DriftReading, FieldResult, FigureReading, Provenance, SampleState

WEIGHT: Final = 0.25
"""Of the newest slide: the average reaches over some seven. Lucas and Saccucci's tables: 0.1 to 0.25 for shifts of one
to two standard deviations."""

FEWEST_NUCLEATED: Final = 50
"""Nucleated cells that were looked at, below which a slide says nothing of its cells: one cell is 2 % points then."""

FEWEST_FIELDS: Final = 3
"""Below which a slide says nothing of focus and colours."""

MOST_FIELDS: Final = 500
"""A slide that goes on is taken for another one after so many: it may never end."""

Scale = Literal["log", "share", "plain"]
"""What is charted: the natural logarithm; the angle of a share, whose spread is the same for all; the value itself."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A watched figure. least: the smallest shift worth telling, on its scale. look_at: what to do when it moves."""

    words: str
    unit: str
    scale: Scale
    least: float
    look_at: str


LAMP: Final = "look at the lamp, its filter and the white balance of the camera"

FIGURES: Final[Mapping[str, Figure]] = MappingProxyType(
    {
        "focus": Figure(
            *("the focus", "thousandths", "log", math.log(1.25)),
            "look at the focus, the immersion oil and the front lens of the objective",
        ),
        "ground-blue": Figure("blue over green of the ground", "ratio", "log", math.log(1.05), LAMP),
        "ground-red": Figure("red over green of the ground", "ratio", "log", math.log(1.05), LAMP),
        "stain-density": Figure(
            *("the density of the stain", "optical density in green", "log", math.log(1.1)),
            "look at the staining times, the age of the stain and the thickness of the smears",
        ),
        "stain-hue": Figure(
            *("the stain's density in red over that in green", "ratio", "log", math.log(1.1)),
            "look at the age of the stain and the pH of the buffer",
        ),
        "confidence": Figure(
            *("the mean probability of the names", "%", "plain", 0.02),
            "look at stain and focus, and name cells yourself: `hematovision review list`",
        ),
        UNIDENTIFIED: Figure(
            *("the share of unidentified cells", "%", "share", 0.05),
            "look at stain and focus, and at the cells: `hematovision review list`",
        ),
    }
)
"""Beside the share of each nucleated class. A ground that is off by 5 % costs no cell yet (docs/preprocessing.md)."""

MOST_SENTENCES: Final = 5
"""Of an alert's message; the rest are counted."""


def share_figure(class_name: str) -> Figure:
    """The share of a class among the nucleated cells with a name."""
    return Figure(
        *(f"the share of {class_name} among the named nucleated cells", "%", "share", 0.05),
        "ask first whether the patients are others than usual, then look at cells of this class in the reports",
    )


SHARE: Final = "share-"


def share_name(class_name: str) -> str:
    """The name of its chart."""
    return f"{SHARE}{class_name}"


def figure_of(name: str) -> Figure:
    """The figure of a chart. Raises KeyError for one of another version."""
    return share_figure(name.removeprefix(SHARE)) if name.startswith(SHARE) else FIGURES[name]


@dataclass(frozen=True, slots=True)
class DriftPlan:
    """What is watched here, and how. basis: names what a baseline belongs to; classes: nucleated ones, by name."""

    basis: str
    how: Plan
    classes: tuple[str, ...]

    def figures(self) -> Mapping[str, Figure]:
        """All figures by name, in the order in which they are told."""
        return {**FIGURES, **{share_name(class_name): share_figure(class_name) for class_name in self.classes}}


@dataclass(frozen=True, slots=True)
class SlideTally:
    """What the open slide has given so far. at: of its last field, RFC 3339.

    cells: nucleated ones by class, and `unidentified`. probability: sum over the named ones. fields, sums: by figure
    the fields in which it was measured, and the sum of its values.
    """

    sid: str = ""
    at: str = ""
    seen: int = 0
    cells: Mapping[str, int] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    probability: float = 0.0
    fields: Mapping[str, int] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    sums: Mapping[str, float] = dataclasses.field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class DriftMemory:
    """What is known of the usual; kept over a restart. charts: by the name of their figure."""

    basis: str = ""
    charts: Mapping[str, Chart] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    slide: SlideTally = SlideTally()


def drift_plan(config: Config, provenance: Provenance, nucleated: tuple[str, ...]) -> DriftPlan | None:
    """How this device is watched; None = it is not. nucleated: the classes whose shares are followed."""
    section = config.drift
    if not section.enabled or not config.camera.is_one_device:
        return None
    tail = 2 * (1 - NormalDist().cdf(section.limit))
    return DriftPlan(_basis(config, provenance), Plan(section.slides, WEIGHT, tail), nucleated)


def follow_field(memory: DriftMemory, plan: DriftPlan, field: FieldResult, sample: SampleState) -> DriftMemory:
    """What is known after a field of this sample that passed the gate. A baseline of other models is left behind."""
    if memory.basis != plan.basis:
        memory = DriftMemory(plan.basis)
    if memory.slide.sid != sample.sid or memory.slide.seen >= MOST_FIELDS:
        memory = replace(_close(memory, plan), slide=SlideTally(sample.sid))
    return replace(memory, slide=_add(memory.slide, field, plan.classes))


def follow_end(memory: DriftMemory, plan: DriftPlan, sample: SampleState) -> DriftMemory:
    """What is known after the end of this sample: a finished one counts, one that was thrown over does not."""
    if memory.slide.sid != sample.sid or memory.basis != plan.basis:
        return memory
    if sample.phase == "finished":
        return replace(_close(memory, plan), slide=SlideTally())
    return replace(memory, slide=SlideTally()) if sample.phase == "aborted" else memory


def read_drift(memory: DriftMemory, plan: DriftPlan) -> DriftReading:
    """How far the usual is learnt, and how each figure that is watched by now is to it."""
    charts = memory.charts if memory.basis == plan.basis else {}
    known = {name for name, chart in charts.items() if chart.limit > 0}
    watched = {name: _reading(figure, charts[name]) for name, figure in plan.figures().items() if name in known}
    slides = max((chart.values for chart in charts.values()), default=0)
    return DriftReading(slides, plan.how.learn, watched)


def drift_words(reading: DriftReading) -> str | None:
    """All that has moved, for the alert; None = nothing has. Stays the same while the same figures are moved."""
    moved = [figure.moved for figure in reading.figures.values() if figure.moved is not None]
    if not moved:
        return None
    more = f"; {len(moved) - MOST_SENTENCES} more in health" if len(moved) > MOST_SENTENCES else ""
    return f"{'; '.join(moved[:MOST_SENTENCES])}{more}. If it was changed on purpose: `hematovision ask relearn`"


def to_text(memory: DriftMemory) -> str:
    """What should be known after a restart, in one line of JSON."""
    slide = {key: dict(value) if isinstance(value, Mapping) else value for key, value in _parts(memory.slide).items()}
    charts = {
        name: {**_parts(chart), "shift": chart.shift and _parts(chart.shift)} for name, chart in memory.charts.items()
    }
    return json.dumps({"basis": memory.basis, "charts": charts, "slide": slide}, separators=(",", ":"))


def from_text(text: str | None) -> DriftMemory:
    """The memory again; an empty one where there is none, or it cannot be read: then the usual is learnt anew."""
    try:
        stored = json.loads(text or "")
        charts = {
            name: Chart(**{**chart, "shift": None if chart["shift"] is None else Shift(**chart["shift"])})
            for name, chart in stored["charts"].items()
        }
        return DriftMemory(stored["basis"], charts, SlideTally(**stored["slide"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return DriftMemory()


def _parts(value: Chart | Shift | SlideTally) -> dict[str, object]:
    return {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}


# ------------------------------------------------------------------------------------------------------- the values


def field_values(field: FieldResult) -> Iterator[tuple[str, float]]:
    """What one field says of focus and colours, by the name of the figure, on its scale."""
    quality = field.quality
    if quality.focus > 0:
        yield "focus", math.log(quality.focus)
    if quality.colour is None:
        return
    blue, red = cast_of(quality.colour)
    yield "ground-blue", blue
    yield "ground-red", red
    stain = quality.colour.stain_od_bgr
    if stain is not None and min(stain[1:]) > 0:
        yield "stain-density", math.log(stain[1])
        yield "stain-hue", math.log(stain[2] / stain[1])


def _add(slide: SlideTally, field: FieldResult, classes: tuple[str, ...]) -> SlideTally:
    cells, probability = Counter(slide.cells), slide.probability
    for cell in field.cells:
        if cell.is_counted is False:
            continue
        if cell.status is CellStatus.UNIDENTIFIED:
            cells[UNIDENTIFIED] += 1
        elif cell.status in (CellStatus.ACCEPTED, CellStatus.EDGE) and cell.class_name in classes:
            cells[cell.class_name] += 1
            probability += cell.probability
    fields, sums = Counter(slide.fields), dict(slide.sums)
    for name, value in field_values(field):
        fields[name] += 1
        sums[name] = sums.get(name, 0.0) + value
    at = field.frame.captured_at.isoformat(timespec="seconds").replace("+00:00", "Z")
    return SlideTally(slide.sid, at, slide.seen + 1, dict(cells), probability, dict(fields), sums)


def _close(memory: DriftMemory, plan: DriftPlan) -> DriftMemory:
    """The charts with what the open slide has given."""
    slide, figures, charts = memory.slide, plan.figures(), dict(memory.charts)
    for name, value, noise in _slide_values(slide, plan.classes):
        charts[name] = follow(
            charts.get(name, Chart()), value, slide.at, plan.how, least=figures[name].least, noise=noise
        )
    return replace(memory, charts=charts)


def _slide_values(slide: SlideTally, classes: tuple[str, ...]) -> Iterator[tuple[str, float, float]]:
    """Name of the figure, value and the noise that it has by the counting; nothing where too little was seen."""
    for name, fields in slide.fields.items():
        if fields >= FEWEST_FIELDS:
            yield name, slide.sums[name] / fields, 0.0
    looked_at = sum(slide.cells.values())
    unidentified = slide.cells.get(UNIDENTIFIED, 0)
    named = looked_at - unidentified
    if looked_at < FEWEST_NUCLEATED or named == 0:
        return
    yield UNIDENTIFIED, *_angle(unidentified, looked_at)
    yield "confidence", slide.probability / named, 0.0
    for class_name in classes:
        yield share_name(class_name), *_angle(slide.cells.get(class_name, 0), named)


def _angle(count: int, of: int) -> tuple[float, float]:
    """The angle of a share and its standard deviation, rad, which does not depend on the share.

    Source: Anscombe, Biometrika 35 (1948) 246-254.
    """
    return math.asin(math.sqrt((count + 0.375) / (of + 0.75))), 0.5 / math.sqrt(of + 0.5)


# -------------------------------------------------------------------------------------------------------- the words


def _reading(figure: Figure, chart: Chart) -> FigureReading:
    usual, now, low, high = (
        shown(figure, value)
        for value in (chart.mean, chart.average, chart.mean - chart.limit, chart.mean + chart.limit)
    )
    moved = None if chart.shift is None else _sentence(figure, chart.shift)
    return FigureReading(usual, now, low, high, figure.unit, moved)


def shown(figure: Figure, value: float) -> float:
    """A value of the chart in the unit of the figure."""
    if figure.scale == "log":
        return math.exp(value)
    if figure.scale == "share":
        return 100 * math.sin(min(max(value, 0.0), math.pi / 2)) ** 2
    return 100 * min(max(value, 0.0), 1.0)


def charted(figure: Figure, value: float) -> float:
    """A value in the unit of the figure as it is charted."""
    if figure.scale == "log":
        return math.log(max(value, 1e-9))
    if figure.scale == "share":
        return math.asin(math.sqrt(min(max(value / 100, 0.0), 1.0)))
    return value / 100


def _sentence(figure: Figure, shift: Shift) -> str:
    usual, now = (f"{shown(figure, value):.3g}" for value in (shift.usual, shift.now))
    unit = {"ratio": "", "%": " %"}.get(figure.unit, f" ({figure.unit})")
    return f"{figure.words} moved from {usual} to {now}{unit} since {shift.since}: {figure.look_at}"


# -------------------------------------------------------------------------------------------------------- the basis


SAME_CAMERA: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "usb": ("device", "width_px", "height_px", "fourcc"),
        "network": ("url",),
        "folder": ("path",),
        "video": (),
        "simulated": (),
    }
)
"""By kind of camera the keys of its section that tell one from another; the rest is how it is read."""


def _basis(config: Config, provenance: Provenance) -> str:
    """16 hex digits that name models, preprocessing and camera: with other ones another thing is usual."""
    names = provenance.thresholds
    says = {
        "models": [provenance.detector.sha256, provenance.classifier.sha256, names and names.rules_sha256],
        "preprocessing": config.preprocessing.model_dump(mode="json"),
        "camera": _camera(config.camera),
    }
    return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:16]


def _camera(camera: CameraSection) -> dict[str, object]:
    section = getattr(camera, camera.kind).model_dump(mode="json")
    told = {key: section[key] for key in SAME_CAMERA[camera.kind]}
    return {"kind": camera.kind, "um_per_px": camera.um_per_px, **told}
