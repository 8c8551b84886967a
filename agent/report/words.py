"""Figures as people read them, the same in every rendering of a report."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from agent.analysis.agreement import FEWEST_FOR_KAPPA

STATUS_WORDS: Mapping[str, str] = MappingProxyType(
    {"preliminary": "running, not final", "final": "final", "amended": "final, amended by a person"}
)

FLAG_WORDS: Mapping[str | None, str] = MappingProxyType(
    {
        None: "not compared",
        "within": "within",
        "low": "below, surely",
        "high": "above, surely",
        "perhaps-low": "perhaps below",
        "perhaps-high": "perhaps above",
    }
)


def interval_words(low_pct: float, high_pct: float) -> str:
    """Bounds in %."""
    return f"{low_pct:.1f} to {high_pct:.1f}"


def reference_words(reference: Mapping[str, Any] | None) -> str:
    return "-" if reference is None else f"{reference['low_pct']:g} to {reference['high_pct']:g}"


def ratio_words(ratio: Mapping[str, Any]) -> str:
    """A ratio with its interval and its count."""
    high = "no upper bound" if ratio["high"] is None else f"{ratio['high']:.2f}"
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {high}), {ratio['count']} cells"


def concentration_words(one: Mapping[str, Any]) -> str:
    """Cells in a microlitre with their interval; tenths only where they say something."""
    value, low, high = (
        f"{cells:.0f}" if cells >= 1000 else f"{cells:g}"
        for cells in (one["per_ul"], one["low_per_ul"], one["high_per_ul"])
    )
    return f"{value} ({low} to {high})"


def counted_words(counts: Mapping[str, int]) -> str:
    """Names with their counts, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name} {count}" for name, count in ordered) or "none"


def refused_words(refused: Mapping[str, int]) -> str:
    total = sum(refused.values())
    return f"{total} ({counted_words(refused)})" if total else "none"


def focus_words(focus: Mapping[str, float] | None) -> str:
    if focus is None:
        return "not known here"
    return f"median {focus['median']:g}, 5 % of the fields below {focus['p05']:g}, lowest {focus['lowest']:g}"


def kappa_words(agreement: Mapping[str, Any]) -> str:
    """Cohen's kappa, or why there is none."""
    if agreement["kappa"] is None:
        few = agreement["named"] < FEWEST_FOR_KAPPA
        return f"not told below {FEWEST_FOR_KAPPA} cells" if few else "says nothing with one class only"
    return f"{agreement['kappa']:.2f} (standard error {agreement['kappa_standard_error']:.2f})"
