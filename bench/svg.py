"""Plots as SVG text, from numbers alone: the same numbers give the same file.

Two kinds: bars in groups, as the FlashAttention papers draw speeds over lengths, and lines over
logarithmic axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Told apart by people who do not see all colours (Okabe and Ito, "Color Universal Design", 2008).
COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999"),
    *("#f0e442", "#000000"),
)
FONT = 'font-family="Helvetica, Arial, sans-serif"'
MARGIN = 46  # left of and below a panel's axes
LEGEND = 18  # height of a legend's line


@dataclass(frozen=True, slots=True)
class Bars:
    """A panel of grouped bars.

    Parameters
    ----------
    title : str
    labels : sequence of str
        Of the groups.
    series : mapping
        Name -> a value per group; None where there is none.
    """

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Lines:
    """A panel of lines over two logarithmic axes.

    Parameters
    ----------
    title, x, y : str
        Of the panel and its axes.
    series : mapping
        Name -> points (x, y), all positive. The first one's x are marked on the axis.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]


def text(
    x: float, y: float, what: str, size: int = 11, anchor: str = "middle", more: str = ""
) -> str:
    """A text element."""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {place} {FONT}{more}>{escape(what)}</text>"


def line(x1: float, y1: float, x2: float, y2: float, colour: str = "#cccccc") -> str:
    """A straight line."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="1"/>'


def names_of(panels: Sequence[Bars | Lines]) -> list[str]:
    """All series in order of first appearance."""
    return list(dict.fromkeys(name for panel in panels for name in panel.series))


def bars(title: str, panels: Sequence[Bars], unit: str, columns: int = 2) -> str:
    """A figure of panels of grouped bars, each bar with its number.

    Examples
    --------
    >>> figure = bars("speed", [Bars("d64", ["512", "1k"], {"ours": [10.0, None]})], "TFLOP/s")
    >>> figure.count("<rect"), ">10<" in figure
    (3, True)
    """
    names = names_of(panels)
    groups = max((len(panel.labels) for panel in panels), default=1)
    width = max(360, groups * (len(names) * 14 + 14))
    drawn = [_bars(panel, names, unit, width, 220) for panel in panels]
    return _figure(title, names, drawn, columns, width, 220)


def lines(title: str, panels: Sequence[Lines], columns: int = 2) -> str:
    """A figure of panels of lines over logarithmic axes."""
    names = names_of(panels)
    drawn = [_lines(panel, names, 380, 260) for panel in panels]
    return _figure(title, names, drawn, columns, 380, 260)


def _figure(
    title: str, names: Sequence[str], drawn: Sequence[str], columns: int, width: int, height: int
) -> str:
    columns = max(1, min(columns, len(drawn)))
    rows = -(-len(drawn) // columns)
    cell = width + MARGIN + 20, height + MARGIN + 30
    total = columns * cell[0] + 20
    per_line = max(1, (total - 20) // 190)
    top = 34 + LEGEND * -(-len(names) // per_line)
    size = total, top + rows * cell[1] + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
        text(size[0] / 2, 22, title, 15),
    ]
    for place, name in enumerate(names):
        x, y = 20 + 190 * (place % per_line), 34 + LEGEND * (place // per_line)
        parts.append(f'<rect x="{x}" y="{y}" width="11" height="11" fill="{colour(place)}"/>')
        parts.append(text(x + 16, y + 10, name, 12, "start"))
    for place, panel in enumerate(drawn):
        x, y = MARGIN + cell[0] * (place % columns), top + 24 + cell[1] * (place // columns)
        parts.append(f'<g transform="translate({x},{y})">{panel}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def colour(place: int) -> str:
    """Of the series at a place."""
    return COLOURS[place % len(COLOURS)]


def step(largest: float) -> float:
    """A round distance of grid lines, four or five of which reach the largest value.

    Examples
    --------
    >>> step(730), step(0.9)
    (200.0, 0.2)
    """
    rough = max(largest, 1e-9) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(unit * f for f in (1, 2, 5, 10) if unit * f >= rough * 0.999)


def _bars(panel: Bars, names: Sequence[str], unit: str, width: int, height: int) -> str:
    values = [v for row in panel.series.values() for v in row if v is not None]
    apart = step(max(values, default=1.0))
    top = apart * max(1, math.ceil(1.08 * max(values, default=1.0) / apart))
    parts = [text(width / 2, -8, panel.title, 13), text(-MARGIN + 2, -8, unit, 10, "start")]
    for number in range(round(top / apart) + 1):
        y = height * (1 - number * apart / top)
        parts += [line(0, y, width, y), text(-4, y + 4, f"{number * apart:g}", 10, "end")]
    group = width / max(1, len(panel.labels))
    thick = (group - 8) / max(1, len(names))
    for at, label in enumerate(panel.labels):
        parts.append(text(group * (at + 0.5), height + 15, label, 11))
        for place, name in enumerate(names):
            row = panel.series.get(name)
            value = None if row is None else row[at]
            if value is None:
                continue
            x, y = group * at + 4 + thick * place, height * (1 - value / top)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{thick - 1:.1f}" height="{height - y:.1f}" '
                f'fill="{colour(place)}"/>'
            )
            middle = x + thick / 2
            turned = f' transform="rotate(-90 {middle:.1f} {y - 3:.1f})"'
            parts.append(text(middle + 3, y - 3, f"{value:.0f}", 8, "start", turned))
    return "".join([*parts, line(0, height, width, height, "#000000")])


def _lines(panel: Lines, names: Sequence[str], width: int, height: int) -> str:
    points = [point for row in panel.series.values() for point in row]
    x_low, x_high = _decades(x for x, _ in points)
    y_low, y_high = _decades(y for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        return width * across, height * (1 - (math.log10(y) - y_low) / (y_high - y_low))

    parts = [text(width / 2, -8, panel.title, 13), text(width / 2, height + 32, panel.x, 11)]
    parts.append(text(-MARGIN + 2, -8, panel.y, 10, "start"))
    for power in range(math.ceil(y_low), math.floor(y_high) + 1):
        _, y = place(10**x_low, 10.0**power)
        parts += [line(0, y, width, y), text(-4, y + 4, f"{10.0**power:g}", 10, "end")]
    for x in sorted({x for x, _ in next(iter(panel.series.values()), ())}):
        across, _ = place(x, 10**y_low)
        parts += [
            line(across, 0, across, height, "#eeeeee"),
            text(across, height + 15, short(x), 9),
        ]
    for number, name in enumerate(names):
        row = [place(*point) for point in sorted(panel.series.get(name, ()))]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in row)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour(number)}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour(number)}"/>' for x, y in row
        ]
    return "".join(
        [*parts, line(0, height, width, height, "#000000"), line(0, 0, 0, height, "#000000")]
    )


def _decades(values: Iterable[float]) -> tuple[float, float]:
    """Logarithms of the range, and a little more on both sides."""
    found = [math.log10(value) for value in values] or [0.0]
    return min(found) - 0.1, max(found) + 0.1


def short(length: float) -> str:
    """A length as the papers write it.

    Examples
    --------
    >>> short(512), short(16384), short(0.25)
    ('512', '16k', '0.25')
    """
    return f"{length / 1024:g}k" if length >= 1024 else f"{length:g}"
