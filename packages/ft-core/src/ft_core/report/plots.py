"""The plots of a report, as SVG that takes its colours and font from the page.

The SVG is part of the page (inline), so `var(--name)` in it follows the page's light or dark
theme, and its text is text. It holds metric names but no run name and no text of the data:
those stand in the page, which escapes them.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ft_core.extras import import_extra
from ft_core.report.comparison import Measure, RankChanges
from ft_core.report.text import metric_label, printable

EXTRA = "ft-core[report]"

_WIDTH = 5.2  # inches; at 72 units an inch, near the width of a phone, so text stays legible
# Colours that stand for the page's variables: matplotlib wants real ones.
_VARIABLES = {
    "#0a0b01": "--ink",
    "#0a0b02": "--muted",
    "#0a0b03": "--line",
    "#0a0b04": "--better",
    "#0a0b05": "--worse",
    "#0a0b06": "--card",
    **{f"#0a0b1{i}": f"--run{i}" for i in range(8)},
}
_COLOUR = {variable: colour for colour, variable in _VARIABLES.items()}
_INK, _MUTED, _LINE = (_COLOUR[name] for name in ("--ink", "--muted", "--line"))


def run_colour(index: int) -> str:
    """Return the page's variable that colours run `index`; the baseline comes first."""
    return f"--run{index % 8}"


def metrics_plot(runs: Sequence[dict[str, Measure]], metrics: Sequence[str], *, prefix: str) -> str:
    """Return an SVG of each run's mean with its interval, a row for each metric.

    Args:
        runs: metric to measure, in the order of `run_colour`.
        metrics: which, from top to bottom.
        prefix: begins every id in the SVG; of its own for each plot of a page.
    """
    points = [
        [(m.mean, m.low, m.high) if (m := run.get(metric)) else None for metric in metrics]
        for run in runs
    ]
    return _interval_plot(points, range(len(runs)), metrics, prefix, zero=False)


def differences_plot(
    runs: Sequence[dict[str, Measure]], metrics: Sequence[str], *, prefix: str
) -> str:
    """Return an SVG of each run's difference to the baseline; `runs` begin with the baseline."""
    points = [
        [
            (m.difference.value, m.difference.low, m.difference.high)
            if (m := run.get(metric)) and m.difference
            else None
            for metric in metrics
        ]
        for run in runs[1:]
    ]
    return _interval_plot(points, range(1, len(runs)), metrics, prefix, zero=True)


def ranks_plot(ranks: RankChanges, *, prefix: str) -> str:
    """Return an SVG of ranks before (across) and after (up), a dot for each pair of ranks.

    A dot's area grows with the number of queries. Queries without a relevant document down
    to `ranks.depth` lie in a band of their own.
    """
    figure, axes = _figure(_WIDTH)
    beyond = _beyond(ranks.depth)
    counts = Counter((before or beyond, after or beyond) for before, after in ranks.pairs)
    end = beyond * 1.4
    start = 0.72
    axes.set(xscale="log", yscale="log", xlim=(start, end), ylim=(end, start))
    axes.set_aspect("equal")
    edge = (ranks.depth * beyond) ** 0.5 if ranks.depth > 1 else (1 + beyond) / 2
    for span in (axes.axvspan, axes.axhspan):
        span(edge, end, color=_LINE, alpha=0.35, linewidth=0)
    axes.plot([start, end], [start, end], color=_LINE, linewidth=1, zorder=1)
    largest = max(counts.values(), default=1)
    for (before, after), count in sorted(counts.items(), key=lambda item: -item[1]):
        name = "--muted" if before == after else "--better" if after < before else "--worse"
        axes.scatter(
            [before],
            [after],
            s=14 + 600 * (count - 1) / max(largest, 40),
            color=_COLOUR[name],
            edgecolor=_COLOUR["--card"],
            linewidth=0.6,
            alpha=0.75,
            zorder=3,
        )
    ticks = [rank for rank in (1, 2, 5, 10, 20, 50, 100, 200, 500) if rank <= ranks.depth]
    labels = [*map(str, ticks), "none"]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([*ticks, beyond], labels)
        axis.set_ticks([], minor=True)
    axes.set_xlabel("rank before", color=_MUTED)
    axes.set_ylabel("rank after", color=_MUTED)
    return _svg(figure, prefix, "Rank of each query's best relevant document before and after")


def _interval_plot(
    points: Sequence[Sequence[tuple[float, float, float] | None]],
    colours: Sequence[int],
    metrics: Sequence[str],
    prefix: str,
    *,
    zero: bool,
) -> str:
    step = 0.15
    row = max(0.46, step * (len(points) + 1))
    figure, axes = _figure(0.75 + row * len(metrics))
    for index, (colour, run) in enumerate(zip(colours, points, strict=True)):
        for position, point in enumerate(run):
            if point is None:
                continue
            value, low, high = point
            y = position + (index - (len(points) - 1) / 2) * step / row
            paint = _COLOUR[run_colour(colour)]
            axes.plot([low, high], [y, y], color=paint, linewidth=1.8, solid_capstyle="round")
            axes.plot([value], [y], "o", color=paint, markersize=5.5)
    if zero:
        axes.axvline(0, color=_INK, linewidth=0.9, zorder=1)
    axes.set_ylim(len(metrics) - 0.5, -0.5)
    axes.set_yticks(range(len(metrics)), [printable(metric_label(m)) for m in metrics])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.margins(x=0.06)
    axes.grid(axis="x", color=_LINE, linewidth=0.8)
    axes.locator_params(axis="x", nbins=6)
    what = "Difference to the baseline" if zero else "Mean"
    return _svg(figure, prefix, f"{what} of each metric with its 95 % interval")


def _figure(height: float) -> tuple[Any, Any]:
    # `Figure` itself, not pyplot: nothing global, so a notebook's plots are left alone.
    figure = import_extra("matplotlib.figure", EXTRA).Figure(figsize=(_WIDTH, height))
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, colors=_INK, labelsize=12, pad=6)
    axes.xaxis.label.set_fontsize(12)
    axes.yaxis.label.set_fontsize(12)
    return figure, axes


def _beyond(depth: int) -> float:
    """Return where the band of what was not found lies, on the axis of ranks."""
    return max(depth * 1.9, depth + 1.0)


def _svg(figure: Any, prefix: str, label: str) -> str:
    matplotlib = import_extra("matplotlib", EXTRA)
    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": prefix}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.03)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML declaration inside a page
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
