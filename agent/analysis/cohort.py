"""Samples of one age band beside those of another: what was counted, and how the models behaved.

    SampleFacts, SampleFacts, ... --compare--> groups of lines, each the median of its samples with an interval

The unit is the sample, not the cell: cells of one person resemble each other, and an interval of all cells of a band
taken together would be far too narrow. A group that is too small has no lines at all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Literal, get_args

from agent.analysis.intervals import Interval, binomial_interval, median_interval
from agent.domain import AgeBand

FEWEST_SAMPLES = 10
"""Samples of a band below which nothing is told of it: of 10 the interval of a median reaches from the second smallest
to the second largest; of fewer single persons could be made out."""

LEAST_FEWEST = 6
"""A limit below this cannot be asked for: with 5 samples no interval of a median reaches 95 %."""

FEWEST_LEUKOCYTES = 50
"""Classified leukocytes below which a sample's shares are left out: one cell moves them by over 2 % points then."""

Measure = Literal["share", "per-100-leukocytes", "unidentified", "confidence", "low-margin", "refused"]
"""share: of the classified leukocytes, by class. per-100-leukocytes: cells outside the differential, by class.
unidentified: of the nucleated cells that were looked at. confidence: a sample's median probability of the name given.
low-margin: views whose name was nearer than `LOW_MARGIN` to another. refused: of the frames while it was open."""

UNITS: Mapping[Measure, str] = {
    "share": "% of the classified leukocytes",
    "per-100-leukocytes": "for 100 leukocytes",
    "unidentified": "% of the nucleated cells",
    "confidence": "% probability",
    "low-margin": "% of the views",
    "refused": "% of the frames",
}

BANDS: tuple[AgeBand | None, ...] = (*get_args(AgeBand), None)
"""In the order of age; None = no age was told."""


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What one ended sample adds to a comparison. Shares in %.

    microscope: site and device. models: who named its cells, in words. flags: by class what the share is to the
    reference interval. refused: frames by reason. confidence_pct, low_margin_pct: None = no cells here.
    """

    microscope: tuple[str, str]
    age_band: AgeBand | None
    accession: str | None
    models: str
    leukocytes: int
    shares_pct: Mapping[str, float]
    per_100: Mapping[str, float]
    flags: Mapping[str, str]
    unidentified: int
    nucleated: int
    fields: int
    refused: Mapping[str, int]
    confidence_pct: float | None = None
    low_margin_pct: float | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """How the values of the samples lie: their median with its 95 % interval, and the middle half of them."""

    median: float
    low: float
    high: float
    quarter: float
    three_quarters: float


@dataclass(frozen=True, slots=True)
class Outside:
    """Samples whose share surely lies outside its reference interval, of those that were compared with one.

    below_pct, above_pct: their share of the samples with its interval, 0 to 100.
    """

    compared: int
    below: int
    above: int
    below_pct: Interval
    above_pct: Interval


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of a group. name: a class, or empty. spread: None = of too few samples."""

    measure: Measure
    name: str
    samples: int
    spread: Spread | None
    outside: Outside | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one age band. is_small: fewer than asked for; then it has no lines and no further counts."""

    age_band: AgeBand | None
    samples: int
    is_small: bool
    lines: tuple[Line, ...] = ()
    microscopes: int = 0
    with_shared_accession: int = 0
    models: Mapping[str, int] | None = None
    refused: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All groups that have a sample, in the order of age. fewest: samples below which a group is small."""

    groups: tuple[Group, ...]
    fewest_samples: int
    fewest_leukocytes: int

    @property
    def intervals(self) -> int:
        """How many intervals it holds: of so many some miss by chance."""
        return sum(line.spread is not None for group in self.groups for line in group.lines)


def compare(
    samples: Iterable[SampleFacts],
    fewest_samples: int = FEWEST_SAMPLES,
    fewest_leukocytes: int = FEWEST_LEUKOCYTES,
) -> Comparison:
    """The samples by age band. fewest_samples: from LEAST_FEWEST."""
    if fewest_samples < LEAST_FEWEST:
        raise ValueError(f"{fewest_samples}: at least {LEAST_FEWEST} samples make a group")
    by_band: dict[AgeBand | None, list[SampleFacts]] = defaultdict(list)
    for sample in samples:
        by_band[sample.age_band].append(sample)
    groups = tuple(_group(band, by_band[band], fewest_samples, fewest_leukocytes) for band in BANDS if band in by_band)
    return Comparison(groups, fewest_samples, fewest_leukocytes)


def _group(band: AgeBand | None, samples: Sequence[SampleFacts], fewest: int, fewest_leukocytes: int) -> Group:
    if len(samples) < fewest:
        return Group(band, len(samples), is_small=True)
    values: dict[tuple[Measure, str], list[float]] = defaultdict(list)
    flags: dict[str, Counter[str]] = defaultdict(Counter)
    accessions = Counter(sample.accession for sample in samples if sample.accession is not None)
    refused: Counter[str] = Counter()
    for sample in samples:
        for key, value in _values(sample, fewest_leukocytes):
            values[key].append(value)
        if sample.leukocytes >= fewest_leukocytes:
            for name, flag in sample.flags.items():
                flags[name][flag] += 1
        refused.update(sample.refused)
    return Group(
        band,
        len(samples),
        is_small=False,
        lines=tuple(
            _line(measure, name, values[measure, name], flags[name] if measure == "share" else Counter(), fewest)
            for measure in get_args(Measure)
            for of, name in values
            if of == measure
        ),
        microscopes=len({sample.microscope for sample in samples}),
        with_shared_accession=sum(count for count in accessions.values() if count > 1),
        models=dict(Counter(sample.models for sample in samples).most_common()),
        refused=dict(refused.most_common()),
    )


def _values(sample: SampleFacts, fewest_leukocytes: int) -> Iterable[tuple[tuple[Measure, str], float]]:
    """What a sample says of each measure; nothing where it says nothing."""
    if sample.leukocytes >= fewest_leukocytes:
        for name, pct in sample.shares_pct.items():
            yield ("share", name), pct
        for name, ratio in sample.per_100.items():
            yield ("per-100-leukocytes", name), ratio
    if looked_at := sample.nucleated + sample.unidentified:
        yield ("unidentified", ""), 100 * sample.unidentified / looked_at
    if sample.confidence_pct is not None:
        yield ("confidence", ""), sample.confidence_pct
    if sample.low_margin_pct is not None:
        yield ("low-margin", ""), sample.low_margin_pct
    lost = sum(sample.refused.values())
    if frames := sample.fields + lost:
        yield ("refused", ""), 100 * lost / frames


def _line(measure: Measure, name: str, values: Sequence[float], flags: Counter[str], fewest: int) -> Line:
    interval = median_interval(values) if len(values) >= fewest else None
    if interval is None:
        return Line(measure, name, len(values), None)
    quarter, _, three_quarters = quantiles(values, n=4, method="inclusive")
    spread = Spread(median(values), *interval, quarter, three_quarters)
    compared = sum(flags.values())
    if compared < fewest:
        return Line(measure, name, len(values), spread)
    below, above = flags["low"], flags["high"]
    return Line(
        measure,
        name,
        len(values),
        spread,
        Outside(compared, below, above, _pct(below, compared), _pct(above, compared)),
    )


def _pct(count: int, of: int) -> Interval:
    low, high = binomial_interval(count, of)
    return 100 * low, 100 * high
