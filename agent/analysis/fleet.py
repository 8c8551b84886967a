"""One device beside the others: whether what it sees stands out among them.

    the newest figures of each device --compare_fleet--> a Standing for each device and figure

The figures are the moving averages of `agent.analysis.drift`, by slide. A device is held against the median of the
others and their median absolute deviation, which a second odd device cannot move (Huber and Ronchetti, Robust
Statistics, 2nd edition (2009), chapter 5). Focus is not compared: it differs with camera and optics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from agent.analysis.drift import charted, figure_of, shown

FEWEST_DEVICES: Final = 4
"""With a figure, the one that is judged among them; of fewer nobody can say which one is odd."""

LIMIT: Final = 5.0
FEW: Final = 3.0
"""The limit is 5 robust standard deviations of the others, times 1 + 3 / (number of others): the spread of three is
hardly known. tests/proofs/drift.py measures what comes of it."""

MAD_TO_SIGMA: Final = 1.4826
"""Of normal values."""

LEAST_SPREAD: Final = 1.0
"""Times the smallest shift of a figure that is worth telling: devices that happen to agree make no narrow limit."""

BACK_WITHIN: Final = 0.5
"""Of the limit: who stood out does so until it is as near again."""

NOT_COMPARED: Final = frozenset({"focus"})
OF_THE_OPTICS: Final = frozenset({"ground-blue", "ground-red", "stain-density", "stain-hue"})
"""Figures that no model has a part in. The others are compared among devices with the same models."""

Place = tuple[str, str]
"""Site and device."""


@dataclass(frozen=True, slots=True)
class WatchedFigure:
    """As in `health`, in its own unit: the moving average, and between what it lies by chance on this device."""

    now: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class FleetDevice:
    """What a device says of itself. models: who names its cells, in words."""

    place: Place
    models: str
    figures: Mapping[str, WatchedFigure]


@dataclass(frozen=True, slots=True)
class Standing:
    """A figure here, beside the others. others: their median; low, high: beyond these a device stands out.

    devices: how many others there are; stands_out: None where they are too few.
    """

    name: str
    here: float
    devices: int
    others: float | None = None
    low: float | None = None
    high: float | None = None
    stands_out: bool | None = None


def compare_fleet(
    devices: Iterable[FleetDevice], before: Mapping[Place, Collection[str]] | None = None
) -> Mapping[Place, tuple[Standing, ...]]:
    """Each device against the others. before: by device the figures by which it stood out the last time."""
    listed, before = list(devices), before or {}
    peers: dict[tuple[str, str], list[FleetDevice]] = defaultdict(list)
    for device in listed:
        for name in device.figures:
            peers[_group(device, name)].append(device)
    return {
        device.place: tuple(
            _standing(device, name, peers[_group(device, name)], was_out=name in before.get(device.place, ()))
            for name in device.figures
            if name not in NOT_COMPARED
        )
        for device in listed
    }


def standing_words(standings: Sequence[Standing]) -> str | None:
    """By what a device stands out, and what to look at; None = by nothing."""
    said = [
        f"{figure.words} is {one.here:.3g}{unit} here, {one.others:.3g}{unit} on {one.devices} others"
        f" (up to {one.low:.3g} to {one.high:.3g} would not stand out): {figure.look_at}"
        for one in standings
        if one.stands_out
        for figure in (figure_of(one.name),)
        for unit in ({"%": " %", "ratio": ""}.get(figure.unit, ""),)
    ]
    return "; ".join(said)[:2000] or None


def standing_facts(one: Standing) -> dict[str, object]:
    """A figure of a device beside the others, as it stands in JSON: all but its name and whether it stands out."""
    values = {"here": one.here, "others": one.others, "low": one.low, "high": one.high}
    return {
        "unit": figure_of(one.name).unit,
        **{key: None if value is None else round(value, 4) for key, value in values.items()},
        "devices": one.devices,
    }


def _group(device: FleetDevice, name: str) -> tuple[str, str]:
    return name, "" if name in OF_THE_OPTICS else device.models


def _standing(device: FleetDevice, name: str, peers: Sequence[FleetDevice], *, was_out: bool) -> Standing:
    figure, own = figure_of(name), device.figures[name]
    others = [charted(figure, peer.figures[name].now) for peer in peers if peer is not device]
    if len(others) < FEWEST_DEVICES - 1:
        return Standing(name, own.now, len(others))
    here, middle = charted(figure, own.now), median(others)
    spread = max(MAD_TO_SIGMA * median(abs(value - middle) for value in others), LEAST_SPREAD * figure.least)
    by_chance = (charted(figure, own.high) - charted(figure, own.low)) / 2
    limit = max(LIMIT * (1 + FEW / len(others)) * spread, by_chance)
    return Standing(
        name,
        own.now,
        len(others),
        shown(figure, middle),
        shown(figure, middle - limit),
        shown(figure, middle + limit),
        abs(here - middle) > limit * (BACK_WITHIN if was_out else 1),
    )
