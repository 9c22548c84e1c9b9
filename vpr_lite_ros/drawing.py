"""Pictures of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRUE_COLOUR, FALSE_COLOUR, PATH_COLOUR = "#1a9641", "#d7191c", "#7f8fa6"


def draw_trajectory(
    path: Path,
    xyz: NDArray[np.float64],
    closures: Sequence[tuple[int, int, bool]],
    title: str,
) -> None:
    """Write a picture of a path seen from above, with a line for each closure.

    Parameters
    ----------
    path
        File to write, ``.png``.
    xyz
        (N, 3) positions in the order of time, metres; NaN where not known.
    closures
        (query, match, true): rows of ``xyz``, and whether the closure is true.
    title
        Stands above the picture.
    """
    across, up = ground_axes(xyz)
    figure, axes = _figure()
    axes.plot(xyz[:, across], xyz[:, up], color=PATH_COLOUR, linewidth=1.2, label="path")
    known = np.flatnonzero(np.isfinite(xyz).all(axis=1))
    if len(known):
        axes.plot(*xyz[known[0], [across, up]], "o", color="black", markersize=5, label="start")
    # False ones last: they must not hide under true ones.
    for kind, colour, name in ((True, TRUE_COLOUR, "true"), (False, FALSE_COLOUR, "false")):
        chosen = [(query, match) for query, match, true in closures if true is kind]
        label = f"{name} closures ({len(chosen)})"
        for query, match in chosen:
            ends = xyz[[query, match]]
            axes.plot(
                ends[:, across], ends[:, up], "-o",
                color=colour, linewidth=1.8, markersize=3.5, label=label,
            )  # fmt: skip
            label = "_more"  # matplotlib leaves names with an underscore out of the legend
        if not chosen:
            axes.plot([], [], color=colour, label=label)
    _finish(path, figure, axes, (across, up), title)


def draw_map(
    path: Path,
    corrected: NDArray[np.float64],
    odometry: NDArray[np.float64],
    truth: NDArray[np.float64] | None,
    closures: Sequence[tuple[int, int, bool]],
    title: str,
) -> None:
    """Write a picture of a drive from above: as odometry has it, corrected, and as it was.

    Parameters
    ----------
    path
        File to write, ``.png``.
    corrected, odometry, truth
        (N, 3), (N, 3), (M, 3) positions in the order of time, metres, in one frame.
    closures
        (query, match, believed): rows of ``corrected``.
    title
        Stands above the picture.
    """
    across, up = ground_axes(corrected)
    figure, axes = _figure()
    ways = (
        (truth, "black", "truth", 3.0, 0.25),
        (odometry, FALSE_COLOUR, "odometry", 1.0, 0.8),
        (corrected, "#2b6cb0", "corrected", 1.4, 1.0),
    )
    for xyz, colour, name, width, alpha in ways:
        if xyz is not None:
            axes.plot(
                xyz[:, across], xyz[:, up], color=colour, linewidth=width, alpha=alpha, label=name
            )
    for believed, colour, name in (
        (True, TRUE_COLOUR, "closures"),
        (False, "orange", "not believed"),
    ):
        chosen = [(query, match) for query, match, one in closures if one is believed]
        label = f"{name} ({len(chosen)})"
        for query, match in chosen:
            ends = corrected[[query, match]]
            axes.plot(
                ends[:, across], ends[:, up], "-o",
                color=colour, linewidth=1.2, markersize=3, label=label,
            )  # fmt: skip
            label = "_more"
    _finish(path, figure, axes, (across, up), title)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(path: Path, figure: Any, axes: Any, shown: tuple[int, int], title: str) -> None:
    across, up = shown
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(f"{'xyz'[across]} [m]")
    axes.set_ylabel(f"{'xyz'[up]} [m]")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def ground_axes(xyz: NDArray[np.float64]) -> tuple[int, int]:
    """The two axes along which the path extends most: x y, or x z in a camera's frame."""
    if not np.isfinite(xyz).all(axis=1).any():
        return 0, 1
    extent = np.nanmax(xyz, axis=0) - np.nanmin(xyz, axis=0)
    flat = int(np.argmin(extent[::-1]))  # of equals the last, so that x y is kept
    first, second = (axis for axis in range(3) if axis != 2 - flat)
    return first, second
