"""The plots of a report, each as the text of an SVG file, from the figures alone."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from vpr_lite_ros.drawing import ground_axes
from vpr_lite_ros.evaluation import Floats
from vpr_lite_ros.reporting.decisions import HOW_FAR
from vpr_lite_ros.summary import Record

TRUE_COLOUR, FALSE_COLOUR, QUIET, INK = "#0b6e99", "#d1495b", "#9aa5b1", "#243b53"
ACCENTS = ("#0b6e99", "#7b8794", "#e09f3e")
STAGE_COLOURS = ("#bcccdc", "#0b6e99", "#829ab1", "#e09f3e", "#486581", "#d9e2ec")
MOST_POINTS = 4000
"""Of a path or a timeline: more are not seen, and make the file large."""
_STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "vpr_lite_ros",
    "axes.edgecolor": "#bcccdc", "axes.labelcolor": INK, "xtick.color": "#627d98",
    "ytick.color": "#627d98", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e7eb", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "legend.frameon": False, "text.color": INK,
}  # fmt: skip


class _Plot:
    """One figure being drawn; ``svg`` holds its text once the ``with`` block is left."""

    def __init__(self) -> None:
        self.svg = ""


@contextmanager
def _plot(width: float, height: float, columns: int = 1) -> Iterator[tuple[_Plot, Any]]:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    plot = _Plot()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, columns)
        yield plot, axes
        text = io.StringIO()
        # No date: the same figures give the same bytes.
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True, dpi=150)
        plot.svg = text.getvalue()


def trajectory(xyz: Floats, closures: Sequence[tuple[int, int, bool]]) -> str:
    """The path seen from above; ``closures`` are rows of ``xyz`` (N, 3) and whether it is true."""
    from matplotlib.collections import LineCollection

    across, up = ground_axes(xyz)
    known = np.flatnonzero(np.isfinite(xyz).all(axis=1))
    path = xyz[known[:: max(1, len(known) // MOST_POINTS)]]
    with _plot(7.2, 5.6) as (plot, axes):
        axes.plot(path[:, across], path[:, up], color=QUIET, linewidth=1.3, label="path")
        if len(known):
            begin = xyz[known[0], [across, up]]
            axes.plot(*begin, "o", color=INK, markersize=5, label="start")
        # False ones last: they must not hide under true ones.
        for kind, colour, name in ((True, TRUE_COLOUR, "true"), (False, FALSE_COLOUR, "false")):
            chosen = [(query, match) for query, match, true in closures if true is kind]
            ends = xyz[np.array(chosen, np.int64).reshape(-1, 2)][:, :, [across, up]]
            lines = LineCollection(
                list(ends), colors=colour, linewidths=1.4, label=f"{name} closures ({len(chosen)})",
                rasterized=len(chosen) > MOST_POINTS,
            )  # fmt: skip
            axes.add_collection(lines)
            if len(ends):
                axes.plot(
                    ends[:, 0, 0], ends[:, 0, 1], "o", color=colour, markersize=3.2,
                    rasterized=len(chosen) > MOST_POINTS,
                )  # fmt: skip
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel(f"{'xyz'[across]} [m]")
        axes.set_ylabel(f"{'xyz'[up]} [m]")
        axes.legend(loc="best")
    return plot.svg


def matches(closures: Sequence[tuple[int, int, bool | None]]) -> str:
    """Which frame is where which one was, for want of a map; None: nobody knows whether it is."""
    kinds = ((None, QUIET, ""), (True, TRUE_COLOUR, "true "), (False, FALSE_COLOUR, "false "))
    with _plot(7.2, 5.6) as (plot, axes):
        for kind, colour, name in kinds:
            chosen = np.array([pair[:2] for pair in closures if pair[2] is kind], np.int64)
            if len(chosen):
                axes.plot(
                    chosen[:, 0], chosen[:, 1], "o", color=colour, markersize=4,
                    rasterized=len(chosen) > MOST_POINTS, label=f"{name}closures ({len(chosen)})",
                )  # fmt: skip
        axes.set_xlabel("frame")
        axes.set_ylabel("is where this frame was")
        axes.set_aspect("equal", adjustable="datalim")
        axes.legend(loc="best")
    return plot.svg


def precision_recall(curves: Record, evaluation: Record) -> str:
    """Curves of retrieval, re-ranking and the whole detector, and where it works now."""
    names = {"detector": "whole detector", "retrieval": "retrieval", "reranked": "re-ranked"}
    with _plot(5.2, 4.0) as (plot, axes):
        for (name, label), colour in zip(names.items(), ACCENTS, strict=True):
            curve = curves[name]
            if curve["recall"] and curve["positives"]:
                recall, precision = curve["recall"], curve["precision"]
                axes.plot(
                    [0, *recall], [precision[0], *precision], color=colour,
                    linewidth=2.2 if name == "detector" else 1.2, drawstyle="steps-post",
                    zorder=4 if name == "detector" else 2,
                    label=f"{label}, area {curve['auc']:.3f}",
                )  # fmt: skip
        point = evaluation["recall"], evaluation["precision"]
        if np.isfinite(np.array(point, np.float64)).all():
            axes.plot(
                *point, "o", markersize=9, markerfacecolor="white", markeredgewidth=2.4,
                markeredgecolor=INK, label="these parameters", zorder=5, clip_on=False,
            )  # fmt: skip
        axes.set(xlim=(0, 1.02), ylim=(0, 1.04), xlabel="recall", ylabel="precision")
        if axes.lines:
            axes.legend(loc="lower left")
    return plot.svg


def scores(histograms: Record) -> str:
    """How similarity, match score and the rest are spread over true and false candidates."""
    names = {
        "similarity": "similarity of the pictures", "match_score": "match score",
        "agreement": "matches that agree", "correlation": "matches that correlate",
        "confidence": "confidence",
    }  # fmt: skip
    shown = [name for name in names if name in histograms]
    with _plot(2.6 * len(shown), 2.9, len(shown)) as (plot, all_axes):
        for name, axes in zip(shown, np.atleast_1d(all_axes), strict=True):
            histogram = histograms[name]
            edges = np.array(histogram["edges"])
            for kind, colour in (("false", FALSE_COLOUR), ("true", TRUE_COLOUR)):
                count = np.array(histogram[kind], float)
                # Each by its own sum: there are many more false candidates than true ones.
                axes.stairs(
                    count / max(1.0, count.sum()), edges, fill=True, color=colour, alpha=0.55,
                    label=f"{kind} ({histogram[f'{kind}_count']})",
                )  # fmt: skip
            axes.set_xlabel(names[name])
            axes.grid(axis="x", visible=False)
        first = np.atleast_1d(all_axes)[0]
        first.set_ylabel("share of its kind")
        first.figure.legend(*first.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return plot.svg


def timeline(shown: Record, outcomes: Sequence[str] | None) -> str:
    """Each keyframe at its time, in the row of how far its best candidate came."""
    step = max(1, len(shown["seconds"]) // MOST_POINTS)
    seconds = np.array(shown["seconds"][::step])
    reasons = shown["reason"][::step]
    kinds = list(outcomes or ["none"] * len(shown["reason"]))[::step]
    rows = [status.name for status in HOW_FAR if status.name in set(reasons)]
    with _plot(9.6, 0.34 * len(rows) + 0.8) as (plot, axes):
        at = np.array([rows.index(reason) for reason in reasons])
        colours = [
            {"true": TRUE_COLOUR, "false": FALSE_COLOUR}.get(
                kind, ACCENTS[2] if reason == "ACCEPTED" else QUIET
            )
            for kind, reason in zip(kinds, reasons, strict=True)
        ]
        axes.scatter(seconds, at, c=colours, marker="|", s=60, linewidths=1.1)
        axes.set_yticks(range(len(rows)), [row.replace("_", " ").lower() for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("time in the recording [s]")
    return plot.svg


def latency(stages: Record) -> str:
    """The median of each stage, one after the other."""
    parts = [(name, times["p50"]) for name, times in stages.items() if name != "total"]
    with _plot(9.6, 1.15) as (plot, axes):
        left = 0.0
        for (name, spent), colour in zip(parts, STAGE_COLOURS * len(parts), strict=False):
            axes.barh(0, spent or 0.0, left=left, color=colour, height=0.6, label=name)
            left += spent or 0.0
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("ms a keyframe, median of each stage")
        axes.legend(ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return plot.svg
