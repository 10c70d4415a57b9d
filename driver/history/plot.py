"""Figures over runs: SVG with labelled axes and intervals, a page that holds it, and lines for a terminal."""

from __future__ import annotations

import dataclasses
import html
import math
import re
import statistics
from collections.abc import Sequence

from ..output import format_figure
from .gate import figure_interval
from .record import SHORT_ID
from .rows import Measurement, Metric
from .tables import label, when

DEFAULT_METRICS = ("p50", "p90", "size", "drift", "instructions")
_TITLES = {
    "p50": "p50 latency",
    "p90": "p90 latency",
    "p99": "p99 latency",
    "p99.9": "p99.9 latency",
    "mean": "mean latency",
    "load": "load time",
    "cold_start": "cold start",
    "peak_memory": "peak memory",
    "size": "file size",
    "drift": "drift (cosine distance to the untouched model)",
    "energy": "energy per inference",
    "instructions": "instructions per inference",
}
# Okabe & Ito's colours, which the colour-blind tell apart; marks differ as well.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_SCALES = {
    "ms": ((1e3, "s"), (1.0, "ms"), (1e-3, "µs")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "fraction": ((0.01, "%"),),
    "joules": ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ")),
    "count": ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, "")),
}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 250, 84, 20, 34, 42
_MOST_SERIES, _MOST_LABELS, _LABEL_WIDTH = 14, 8, 132
# Series whose middles lie further apart than this get panels of their own: a change would not be seen.
_ONE_AXIS_FOLD = 2.0
_LONGEST_TITLE = 80
_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 40
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333; }
.title { font-size: 14px; font-weight: 600; fill: #111; }
.grid { stroke: #ddd; stroke-width: 1; }
.axis { stroke: #888; stroke-width: 1; }
.line { fill: none; stroke-width: 1.5; opacity: 0.7; }
.whisker { stroke-width: 1.2; opacity: 0.6; }
"""
_PAGE_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 1000px;
  margin: 24px auto; padding: 0 16px; }
h1 { font-size: 20px; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 12px; } th, td { padding: 3px 10px 3px 0; text-align: left;
  border-bottom: 1px solid #eee; } td.n, th.n { text-align: right; } .void { color: #b00020; }
.scroll { overflow-x: auto; }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Runs of one thing under the same conditions, the oldest first."""

    name: str
    rows: tuple[Measurement, ...]


def series_of(rows: Sequence[Measurement]) -> list[Series]:
    """The rows by model, target, role, device, threads and shapes; names say no more than is needed."""
    groups: dict[tuple[object, ...], list[Measurement]] = {}
    for row in rows:
        about = label(row), row.device, row.kind, row.threads, row.shapes
        groups.setdefault(about, []).append(row)
    firsts = [group[0] for group in groups.values()]
    found = []
    for (name, _, kind, threads, shapes), group in groups.items():
        alike = [first for first in firsts if label(first) == name and first is not group[0]]
        more = [
            f"{threads} threads" if any(first.threads != threads for first in alike) else "",
            str(shapes) if any(first.shapes != shapes for first in alike) else "",
            f"at {kind}" if any(first.kind != kind for first in alike) else "",
        ]
        found.append(Series(name=", ".join(filter(None, [str(name), *more])), rows=tuple(group)))
    return found


def sparkline(values: Sequence[float]) -> str:
    """Values as a line of bars, from the least to the largest; of many, the last 40."""
    shown = values[-_MOST_BARS:]
    low, high = min(shown), max(shown)
    if high == low:
        return _BARS[0] * len(shown)
    return "".join(_BARS[round((value - low) / (high - low) * (len(_BARS) - 1))] for value in shown)


def svg_figure(series: Sequence[Series], metrics: Sequence[Metric]) -> str:
    """Panels below a legend, one or more per metric, as an SVG document of its own.

    Args:
        series: what to draw; beyond 14 the last ones are left out, which the legend says.
        metrics: what to draw of them.
    """
    drawn = list(series[:_MOST_SERIES])
    runs = sorted({(row.started, row.run) for one in drawn for row in one.rows})
    places = {run: index for index, (_, run) in enumerate(runs)}
    legend = _legend(drawn, len(series) - len(drawn))
    top = 14 + 20 * len(legend)
    parts = [f'<g transform="translate(0 {14 + 20 * index})">{text}</g>' for index, text in enumerate(legend)]
    panels = [(metric, own) for metric in metrics for own in _together(_measured(drawn, metric), metric)]
    for index, (metric, own) in enumerate(panels):
        whose = "" if len(own) == len(drawn) else f": {', '.join(one.name for _, one in own)}"
        body = _panel(
            metric, own, runs, places, whose if len(whose) < _LONGEST_TITLE else whose[:_LONGEST_TITLE] + "…"
        )
        parts.append(f'<g transform="translate(0 {top + index * _HEIGHT})">{body}</g>')
    height = top + len(panels) * _HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" role="img"><title>edgepress: figures over runs</title><style>{_STYLE}</style>'
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _measured(series: Sequence[Series], metric: Metric) -> list[tuple[int, Series]]:
    """The series that have the metric, with their place among all: their colour."""
    return [
        (index, one)
        for index, one in enumerate(series)
        if any(metric.of(row) is not None for row in one.rows)
    ]


def _together(series: Sequence[tuple[int, Series]], metric: Metric) -> list[list[tuple[int, Series]]]:
    """The series by panels: of one size in one panel, the largest first."""

    def middle(item: tuple[int, Series]) -> float:
        return statistics.median(value for row in item[1].rows if (value := metric.of(row)) is not None)

    panels: list[list[tuple[int, Series]]] = []
    for item in sorted(series, key=middle, reverse=True):
        if not panels or middle(panels[-1][0]) > _ONE_AXIS_FOLD * middle(item):
            panels.append([])
        panels[-1].append(item)
    return panels


def _legend(series: Sequence[Series], left_out: int) -> list[str]:
    lines = [
        f'{_mark(index, _LEFT + 6, 0, void=False)}<text x="{_LEFT + 20}" y="4">{_safe(one.name)}</text>'
        for index, one in enumerate(series)
    ]
    notes = ["whiskers: 95 % intervals within the run"]
    if any(row.void for one in series for row in one.rows):
        notes.append("hollow, crossed out: void runs, which do not count")
    if left_out > 0:
        notes.append(f"{left_out} more series are not drawn: filter by model, target or device")
    return [*lines, f'<text x="{_LEFT}" y="4" opacity="0.75">{_safe("; ".join(notes))}</text>']


def _panel(
    metric: Metric,
    series: Sequence[tuple[int, Series]],
    runs: Sequence[tuple[str, str]],
    places: dict[str, int],
    whose: str,
) -> str:
    points = [
        (number, row, value, *_whisker(metric, row))
        for number, one in series
        for row in one.rows
        if (value := metric.of(row)) is not None
    ]
    sides = [side for point in points for side in point[2:] if side is not None]
    unit, scale, ticks = _axis(min(sides), max(sides), metric)
    bottom, high = _HEIGHT - _BOTTOM, ticks[-1]

    def x_of(row: Measurement) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (places[row.run] + 0.5) / len(places)

    def y_of(value: float) -> float:
        return _TOP + (high - value / scale) / (high - ticks[0]) * (bottom - _TOP)

    title = f"{_TITLES.get(metric.name, metric.name)}{f' [{unit}]' if unit else ''}"
    if ticks[0] > 0:
        title += ", axis not from 0"
    title += whose
    parts = [f'<text class="title" x="{_LEFT}" y="{_TOP - 14}">{_safe(title)}</text>']
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for tick in ticks:
        y = y_of(tick * scale)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.{digits}f}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{_WIDTH - _RIGHT}" y2="{bottom}"/>')
    parts += _times(runs, bottom)
    for number, one in series:
        line = " ".join(
            f"{x_of(row):.1f},{y_of(value):.1f}"
            for row in one.rows
            if not row.void and (value := metric.of(row)) is not None
        )
        parts.append(f'<polyline class="line" stroke="{_colour(number)}" points="{line}"/>')
    for number, row, value, least, most in points:
        x, colour = x_of(row), _colour(number)
        if least is not None and most is not None and most > least:
            parts.append(_whisker_lines(x, y_of(least), y_of(most), colour))
        told = f"{label(row)}: {metric.name} {format_figure(value, metric.unit)}, run {when(row)}"
        if row.void:
            told += f"; void: {'; '.join(row.void_reasons)}"
        mark = _mark(number, x, y_of(value), void=row.void)
        parts.append(f"<g><title>{_safe(told)}</title>{mark}</g>")
    return "".join(parts)


def _whisker(metric: Metric, row: Measurement) -> tuple[float | None, float | None]:
    return (None, None) if metric.exact else figure_interval(metric, row)


def _whisker_lines(x: float, low: float, high: float, colour: str) -> str:
    ends = ((x, low, x, high), (x - 3, low, x + 3, low), (x - 3, high, x + 3, high))
    return "".join(
        f'<line class="whisker" stroke="{colour}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        for x1, y1, x2, y2 in ends
    )


def _times(runs: Sequence[tuple[str, str]], bottom: float) -> list[str]:
    """The time of some runs below the axis; runs stand side by side, whatever time lies between them."""
    width = (_WIDTH - _LEFT - _RIGHT) / len(runs)
    step = max(1, math.ceil(len(runs) / _MOST_LABELS), math.ceil(_LABEL_WIDTH / width))
    parts = []
    for index in range(0, len(runs), step):
        x = _LEFT + width * (index + 0.5)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}"/>')
        if index == 0 or x + _LABEL_WIDTH / 2 < _WIDTH:  # it would be cut off, or lie over another
            text = _safe(f"{runs[index][0][:10]} {runs[index][0][11:16]}")
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    return parts


def _axis(low: float, high: float, metric: Metric) -> tuple[str, float, list[float]]:
    """Unit, its size, and ticks in it at 1, 2 or 5 times a power of ten, around low and high.

    The axis begins at 0 unless all lies in the upper half; then it is cut, so that changes show.
    """
    scales = _SCALES[metric.unit]
    scale, unit = next(
        ((size, name) for size, name in scales if high >= size), (scales[-1][0], scales[-1][1])
    )
    low, high = low / scale, high / scale
    if low < high / 2 or high == low:
        low = 0.0
    # A little room above: no mark lies on the edge.
    high = low + 1.0 if high == low else high + 0.03 * (high - low)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if raw <= factor * power * (1 + 1e-9))
    first = math.floor(low / step + 1e-9)
    count = max(1, math.ceil(high / step - first - 1e-9))
    return unit, scale, [(first + index) * step for index in range(count + 1)]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _mark(number: int, x: float, y: float, *, void: bool) -> str:
    """A round or a square mark; hollow and crossed out for a void run."""
    colour = _colour(number)
    fill = "#fff" if void else colour
    if number // len(_COLOURS) % 2:
        made = f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{fill}" stroke="{colour}"/>'
    else:
        made = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}"/>'
    if void:
        made += "".join(
            f'<line stroke="#b00020" stroke-width="1.5" x1="{x - 6:.1f}" y1="{y - 6 * way:.1f}" '
            f'x2="{x + 6:.1f}" y2="{y + 6 * way:.1f}"/>'
            for way in (1, -1)
        )
    return made


def html_page(series: Sequence[Series], metrics: Sequence[Metric], made: str) -> str:
    """The figure and its numbers as one page: no script, no other file, no network.

    Args:
        series: what to draw.
        metrics: the panels, and the columns of the table.
        made: when, UTC.
    """
    head = ["run", "started (UTC)", "what", *(metric.name for metric in metrics), "counts"]
    cells = "".join(f"<th{_numeric(index, metrics)}>{_safe(name)}</th>" for index, name in enumerate(head))
    lines = sorted(
        ((row, one.name) for one in series for row in one.rows),
        key=lambda item: item[0].started,
        reverse=True,
    )
    body = "".join(_line(row, name, metrics) for row, name in lines)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>edgepress history</title><style>{_PAGE_STYLE}</style></head><body>"
        f"<h1>edgepress: figures over runs</h1><p>Made {_safe(made)}.</p>{svg_figure(series, metrics)}"
        f'<h2>Runs, the latest first</h2><div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></body></html>\n"
    )


def _numeric(index: int, metrics: Sequence[Metric]) -> str:
    return ' class="n"' if 3 <= index < 3 + len(metrics) else ""


def _line(row: Measurement, name: str, metrics: Sequence[Metric]) -> str:
    texts = [
        row.run[:SHORT_ID],
        row.started[:16].replace("T", " "),
        name,
        *(format_figure(metric.of(row), metric.unit) for metric in metrics),
        f"void: {'; '.join(row.void_reasons)}" if row.void else "yes",
    ]
    cells = "".join(f"<td{_numeric(index, metrics)}>{_safe(text)}</td>" for index, text in enumerate(texts))
    kind = ' class="void"' if row.void else ""
    return f"<tr{kind}>{cells}</tr>"


def _safe(text: str) -> str:
    return html.escape(_NOT_XML.sub("\ufffd", text))
