"""The differential: what share of the leukocytes each class has, and how far that can be trusted.

    counts by class --+-- leukocytes: the whole, each class with its share and interval
                      +-- erythroblasts, smudges: for 100 leukocytes, outside the whole
                      +-- unidentified | not classed: told, and part of no share
                      +-- platelets, red cells: for each field, and red cells for each leukocyte

Which class is what stands in the models' manifest; no class is named here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from agent.analysis.cells import UNIDENTIFIED
from agent.analysis.intervals import (
    LEVEL,
    Interval,
    binomial_interval,
    goodman_intervals,
    poisson_interval,
    ratio_interval,
    trials_for,
)
from agent.analysis.reference import Judgement, find_reference, judge
from agent.domain import AgeBand, ReferenceInterval

CellKind = Literal["leukocyte", "erythroblast", "smudge", "platelet", "red-cell"]
"""What a class of the models is to a differential."""

CELL_KINDS: tuple[CellKind, ...] = get_args(CellKind)

NUCLEATED: tuple[CellKind, ...] = ("leukocyte", "erythroblast")
"""The kinds that count towards the number of nucleated cells at which a sample stops. A smudge is a cell no more."""

PER_100: tuple[CellKind, ...] = ("erythroblast", "smudge")

IntervalMethod = Literal["clopper-pearson", "goodman"]

DRAWS = 2000
"""Of the correction's uncertainty: the bounds of a 95 % interval then move by about a tenth of its width."""

SEED = 20_261_125
"""The same counts give the same corrected column, byte for byte."""

MM3_PER_UM3 = 1e-9
"""One cubic millimetre is one microlitre."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """How often each class was named what, on pictures whose truth is known.

    counts: by true class, then by the name given; a name that is no class (`unidentified`, `missed`) is a cell that
    was not counted under any. Where it was measured stands in the models' manifest.
    """

    counts: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Corrected:
    """A share without the classifier's known confusions; pct, low_pct, high_pct: 0 to 100."""

    pct: float
    low_pct: float
    high_pct: float


@dataclass(frozen=True, slots=True)
class Share:
    """One class of leukocytes. pct and its interval: 0 to 100, of the classified leukocytes."""

    class_name: str
    count: int
    pct: float
    low_pct: float
    high_pct: float
    corrected: Corrected | None = None
    judgement: Judgement | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """A count beside another. high is None where nothing bounds it."""

    name: str
    count: int
    ratio: float
    low: float
    high: float | None


@dataclass(frozen=True, slots=True)
class Chamber:
    """A counting chamber. depth_mm: of the liquid; dilution: 20 = one part of blood in twenty."""

    depth_mm: float
    dilution: float


@dataclass(frozen=True, slots=True)
class Concentration:
    """Cells for each microlitre of blood, with the interval of their Poisson count."""

    kind: CellKind
    count: int
    per_ul: float
    low_per_ul: float
    high_per_ul: float


@dataclass(frozen=True, slots=True)
class Tally:
    """What was counted of a sample so far, and on what.

    counts: by class, `unidentified` too. is_unique: a cell that two fields show was counted once. area_um2: of all
    fields together; None without a calibrated camera. not_classed: cells that were seen and never named.
    """

    counts: Mapping[str, int]
    fields: int
    is_unique: bool = False
    area_um2: float | None = None
    not_classed: int = 0


@dataclass(frozen=True, slots=True)
class Differential:
    """The whole result of a sample at one moment.

    leukocytes: classified ones, the denominator of the shares. nucleated: those and the erythroblasts.
    still_needed: leukocytes to count until the widest interval is as narrow as asked; 0 = it is; None = not asked, or
    beyond reach. per_100: for 100 leukocytes. per_field: platelets and red cells. unidentified: looked at, and no name
    could be trusted. not_classed: never named (cut off, no cell, of a class that the manifest gives no kind).
    """

    tally: Tally
    method: IntervalMethod
    leukocytes: int
    nucleated: int
    shares: tuple[Share, ...]
    per_100: tuple[Ratio, ...]
    per_field: tuple[Ratio, ...]
    red_cells_per_leukocyte: Ratio | None
    unidentified: int
    not_classed: int
    still_needed: int | None
    concentrations: tuple[Concentration, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """How a differential is made.

    kinds: by class name, in the manifest's order. reference: table for all ages. half_width: 0 to 1, asked of the
    widest interval; None = not asked. chamber: None = a smear.
    """

    kinds: Mapping[str, CellKind]
    method: IntervalMethod = "clopper-pearson"
    confusion: Confusion | None = None
    reference: tuple[ReferenceInterval, ...] = ()
    half_width: float | None = None
    chamber: Chamber | None = None


def make_differential(tally: Tally, rules: Rules, age_band: AgeBand | None = None) -> Differential:
    """Everything that the counts of a sample say."""
    counts, kinds = tally.counts, rules.kinds
    of_kind = {kind: count_kind(counts, kinds, kind) for kind in CELL_KINDS}
    leukocytes = of_kind["leukocyte"]
    unnamed = sum(count for name, count in counts.items() if name not in kinds and name != UNIDENTIFIED)
    return Differential(
        tally=tally,
        method=rules.method,
        leukocytes=leukocytes,
        nucleated=count_nucleated(counts, kinds),
        shares=_shares(counts, rules, age_band),
        per_100=tuple(
            _times(ratio, 100)
            for name, kind in kinds.items()
            if kind in PER_100 and (ratio := _ratio(name, counts.get(name, 0), leukocytes)) is not None
        ),
        per_field=tuple(_per_field(kind, of_kind[kind], tally.fields) for kind in ("platelet", "red-cell"))
        if tally.fields
        else (),
        red_cells_per_leukocyte=_ratio("red-cell", of_kind["red-cell"], leukocytes),
        unidentified=counts.get(UNIDENTIFIED, 0),
        not_classed=tally.not_classed + unnamed,
        still_needed=still_needed(counts, kinds, rules.half_width),
        concentrations=_concentrations(of_kind, tally.area_um2, rules.chamber),
    )


def count_kind(counts: Mapping[str, int], kinds: Mapping[str, CellKind], kind: CellKind) -> int:
    """How many cells of one kind."""
    return sum(counts.get(name, 0) for name, of in kinds.items() if of == kind)


def count_nucleated(counts: Mapping[str, int], kinds: Mapping[str, CellKind]) -> int:
    """How many nucleated cells that have a name."""
    return sum(count_kind(counts, kinds, kind) for kind in NUCLEATED)


def still_needed(counts: Mapping[str, int], kinds: Mapping[str, CellKind], half_width: float | None) -> int | None:
    """Leukocytes still to count until each class's interval is +- half_width (0 to 1) or narrower.

    As if the shares stayed as they are; the one nearest to a half is the widest. Before the first cell a half is
    taken, which is the worst case. None where not asked, or out of reach (a million).
    """
    if half_width is None:
        return None
    total = count_kind(counts, kinds, "leukocyte")
    of_class = [counts.get(name, 0) for name, kind in kinds.items() if kind == "leukocyte"]
    widest = min((count / total for count in of_class), key=lambda share: abs(share - 0.5)) if total else 0.5
    needed = trials_for(widest, half_width)
    return None if needed is None else max(0, needed - total)


# ------------------------------------------------------------------------------------------------------- the parts


def _shares(counts: Mapping[str, int], rules: Rules, age_band: AgeBand | None) -> tuple[Share, ...]:
    names = [name for name, kind in rules.kinds.items() if kind == "leukocyte"]
    seen = [counts.get(name, 0) for name in names]
    total = sum(seen)
    if total == 0:
        return ()
    intervals = goodman_intervals(seen) if rules.method == "goodman" else [binomial_interval(n, total) for n in seen]
    corrected = correct_shares(dict(zip(names, seen, strict=True)), rules.confusion)
    return tuple(
        _share(name, count, total, interval, corrected.get(name), find_reference(rules.reference, name, age_band))
        for name, count, interval in zip(names, seen, intervals, strict=True)
    )


def _share(
    name: str,
    count: int,
    total: int,
    interval: Interval,
    corrected: Corrected | None,
    reference: ReferenceInterval | None,
) -> Share:
    pct, low_pct, high_pct = 100 * count / total, 100 * interval[0], 100 * interval[1]
    judgement = None if reference is None else judge(pct, low_pct, high_pct, reference)
    return Share(name, count, pct, low_pct, high_pct, corrected, judgement)


def _ratio(name: str, count: int, base: int) -> Ratio | None:
    if base == 0:
        return None
    low, high = ratio_interval(count, base)
    return Ratio(name, count, count / base, low, high)


def _times(ratio: Ratio, factor: float) -> Ratio:
    high = None if ratio.high is None else ratio.high * factor
    return Ratio(ratio.name, ratio.count, ratio.ratio * factor, ratio.low * factor, high)


def _per_field(kind: CellKind, count: int, fields: int) -> Ratio:
    low, high = poisson_interval(count)
    return Ratio(kind, count, count / fields, low / fields, high / fields)


def _concentrations(
    of_kind: Mapping[CellKind, int], area_um2: float | None, chamber: Chamber | None
) -> tuple[Concentration, ...]:
    """Cells for each microlitre: count x dilution / volume; the volume is area x depth of what was looked at."""
    if chamber is None or not area_um2:
        return ()
    factor = chamber.dilution / (area_um2 * chamber.depth_mm * 1000 * MM3_PER_UM3)
    return tuple(
        Concentration(kind, count, count * factor, low * factor, high * factor)
        for kind, count in of_kind.items()
        if kind != "smudge"
        for low, high in (poisson_interval(count),)
    )


# -------------------------------------------------------------------------------------------------- the correction


def correct_shares(seen: Mapping[str, int], confusion: Confusion | None) -> dict[str, Corrected]:
    """The shares as they would be if the classifier confused nothing; empty where that cannot be told.

    seen: leukocytes by class as named. Solves  seen = confusion x true  for `true`, and takes what is below zero as
    zero. The interval holds the chance of the sample and of the confusion matrix: both are drawn again, DRAWS times,
    from Dirichlet distributions. It does not hold that another stain or microscope confuses differently, nor cells that
    are no leukocytes and were named as one.
    Source: Rogan and Gladen, Am. J. Epidemiol. 107 (1978) 71-76, for two classes; for more: Buonaccorsi, Measurement
    Error (2010), chapter 2.
    """
    names = list(seen)
    if confusion is None or sum(seen.values()) == 0 or any(name not in confusion.counts for name in names):
        return {}
    # (true class, name): only these names are counted; the last column holds all that was not counted.
    known = np.array([[confusion.counts[true].get(name, 0) for name in names] for true in names], np.float64)
    elsewhere = np.array([sum(confusion.counts[true].values()) for true in names], np.float64) - known.sum(1)
    matrix = np.concatenate([known, elsewhere[:, None]], axis=1)
    named = np.array([seen[name] for name in names], np.float64)
    if (matrix.sum(1) == 0).any() or np.linalg.matrix_rank(known / matrix.sum(1, keepdims=True)) < len(names):
        return {}
    shares = _unmix(named[None], matrix[None])[0]

    draws = np.random.default_rng(SEED)
    # Half a cell is added everywhere (Jeffreys): what was never seen may be rare, and not impossible.
    drawn_named = draws.dirichlet(named + 0.5, DRAWS)
    drawn_matrix = np.stack([draws.dirichlet(row + 0.5 / len(row), DRAWS) for row in matrix], axis=1)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(_unmix(drawn_named, drawn_matrix), (tail, 100 - tail), axis=0)
    # Of one class alone the half cells of the others would keep the interval below 100 %, and the share outside it:
    # it reaches the share, as Brown, Cai and DasGupta have it at both ends (Statistical Science 16 (2001) 101-133).
    low, high = np.minimum(low, shares), np.maximum(high, shares)
    return {
        name: Corrected(100 * float(shares[n]), 100 * float(low[n]), 100 * float(high[n]))
        for n, name in enumerate(names)
    }


def _unmix(named: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """True shares, (draws, classes); named: (draws, classes); matrix: (draws, classes, classes + 1), rows of counts."""
    rates = matrix[:, :, :-1] / matrix.sum(2, keepdims=True)
    true: NDArray[np.float64] = np.linalg.solve(rates.transpose(0, 2, 1), named[:, :, None])[:, :, 0]
    np.clip(true, 0, None, out=true)
    true /= np.maximum(true.sum(1, keepdims=True), 1e-12)
    return true


def sum_areas(first_um2: float | None, more_um2: float | None) -> float | None:
    """The area of both; unknown where one is."""
    return None if first_um2 is None or more_um2 is None else first_um2 + more_um2


def kinds_in_order(names: Iterable[str], kinds: Mapping[str, CellKind]) -> dict[str, CellKind]:
    """The kinds of these classes, in the order of the names; a class without a kind is left out."""
    return {name: kinds[name] for name in names if name in kinds}
