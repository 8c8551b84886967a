"""The drawings of a report as inline SVG: the differential with its intervals, and the map of the slide.

Every text goes through `escape`: ids and names come from outside. Nothing hangs on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from agent.report.slide_map import corners

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d3a9b", "#8c564b", "#7f7f7f", "#222222")
"""Okabe and Ito's, which people with colour blindness tell apart (jfly.uni-koeln.de/color), and three more."""

_LABEL_PX, _BAR_PX, _ROW_PX = 190, 430, 34
_MAP_WIDTH_PX, _MAP_HEIGHT_PX = 680.0, 480.0


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each class, in the order of the names."""
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(dict.fromkeys(names))}


def differential_svg(shares: Sequence[Mapping[str, Any]]) -> str:
    """Bars of the shares in %, with 95 % intervals as whiskers, reference intervals as bands behind them."""
    top = max((_upper(share) for share in shares), default=0.0)
    scale_pct = next((limit for limit in (10, 20, 40, 60, 80, 100) if limit >= top), 100)
    height = _ROW_PX * len(shares) + 40
    width = _LABEL_PX + _BAR_PX + 60

    def x(pct: float) -> float:
        return _LABEL_PX + _BAR_PX * min(pct, scale_pct) / scale_pct

    parts = []
    for number in range(5):
        pct = scale_pct * number / 4
        parts.append(
            f'<line x1="{x(pct):.1f}" x2="{x(pct):.1f}" y1="6" y2="{height - 28}" stroke="#ddd"/>'
            f'<text x="{x(pct):.1f}" y="{height - 12}" text-anchor="middle" font-size="11" fill="#444">{pct:g} %</text>'
        )
    colours = colours_of(share["class"] for share in shares)
    for row, share in enumerate(shares):
        middle = 8 + _ROW_PX * row + _ROW_PX / 2
        name = escape(str(share["class"]))
        if share["reference"] is not None:
            low, high = x(share["reference"]["low_pct"]), x(share["reference"]["high_pct"])
            parts.append(
                f'<rect x="{low:.1f}" y="{middle - 14:.1f}" width="{max(1.0, high - low):.1f}" height="28"'
                ' fill="#000" fill-opacity="0.09"/>'
            )
        bar = x(share["pct"]) - _LABEL_PX
        low, high = x(share["low_pct"]), x(share["high_pct"])
        parts.append(
            f'<text x="{_LABEL_PX - 10}" y="{middle + 5:.1f}" text-anchor="end">{name}</text>'
            f'<rect x="{_LABEL_PX}" y="{middle - 8:.1f}" width="{bar:.1f}" height="16"'
            f' fill="{colours[share["class"]]}"/>'
            f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 6:.1f}v12M{high:.1f} {middle - 6:.1f}v12"'
            ' stroke="#111" stroke-width="1.6" fill="none"/>'
        )
        if share["corrected"] is not None:
            at = x(share["corrected"]["pct"])
            parts.append(
                f'<path d="M{at:.1f} {middle - 11:.1f}l5 -6h-10z" fill="#fff" stroke="#111" stroke-width="1.2"/>'
            )
    words = "; ".join(
        f"{share['class']} {share['pct']:.1f} % ({share['low_pct']:.1f} to {share['high_pct']:.1f})" for share in shares
    )
    return (
        f'<svg class="chart" font-size="13" viewBox="0 0 {width} {height}" role="img"'
        ' aria-labelledby="chart-title chart-words">'
        '<title id="chart-title">Differential: shares of the classified leukocytes with 95 % intervals</title>'
        f'<desc id="chart-words">{escape(words)}</desc>{"".join(parts)}</svg>'
    )


def part_svg(part: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """One part of the slide: its fields as frames, its nucleated cells and platelets as dots."""
    outlines = [corners(field) for field in part["fields"]]
    xs = [x for outline in outlines for x, _ in outline]
    ys = [y for outline in outlines for _, y in outline]
    left, top = min(xs), min(ys)
    scale = min(_MAP_WIDTH_PX / max(1.0, max(xs) - left), _MAP_HEIGHT_PX / max(1.0, max(ys) - top))
    width, height = (max(xs) - left) * scale + 8, (max(ys) - top) * scale + 8

    def at(x: float, y: float) -> str:
        return f"{(x - left) * scale + 4:.1f} {(y - top) * scale + 4:.1f}"

    frames = "".join(f"M{'L'.join(at(*corner) for corner in outline)}Z" for outline in outlines)
    parts = [f'<path d="{frames}" fill="#0072b2" fill-opacity="0.06" stroke="#456" stroke-width="0.8"/>']
    radius = max(1.6, min(4.0, 6.0 - len(part["cells"]) / 400))
    for name in dict.fromkeys(cell["class"] for cell in part["cells"]):
        dots = "".join(f"M{at(cell['x_px'], cell['y_px'])}h0" for cell in part["cells"] if cell["class"] == name)
        parts.append(
            f'<path d="{dots}" stroke="{colours.get(name, "#222222")}" stroke-width="{2 * radius:.1f}"'
            f' stroke-linecap="round" fill="none"><title>{escape(str(name))}</title></path>'
        )
    number = int(part["part"])
    words = f"Part {number} of the slide: {len(part['fields'])} fields, {len(part['cells'])} cells"
    return (
        f'<svg class="map" viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img"'
        f' aria-labelledby="part-{number}"><title id="part-{number}">{words}</title>{"".join(parts)}</svg>'
    )


def _upper(share: Mapping[str, Any]) -> float:
    reference = share["reference"]
    return max(float(share["high_pct"]), 0.0 if reference is None else float(reference["high_pct"]))
