"""What the pictures of :mod:`gaba_jax.plot` have in common: style, panels, lines, legends."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from gaba_jax._findings import shortened

# Okabe and Ito's palette: told apart under every kind of colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")  # one after the other where there are more tasks than colours
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH = 4.0  # inches
_Arguments = ParamSpec("_Arguments")


def styled(draw: Callable[_Arguments, Figure]) -> Callable[_Arguments, Figure]:
    """Draws with the style above, whatever the caller's own is."""

    @functools.wraps(draw)
    def drawn(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Figure:
        with matplotlib.rc_context(cast(Any, _STYLE)):
            return draw(*args, **kwargs)

    return drawn


def over_steps(
    arrays: dict[str, ArrayLike], task_names: Sequence[str], steps: ArrayLike | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """The arrays, each [T, K], and the numbers of the updates."""
    values = [np.asarray(array, float) for array in arrays.values()]
    shapes = [each.shape for each in values]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or shapes[0][1] != len(task_names):
        what, got = " and ".join(arrays), " and ".join(map(str, shapes))
        raise ValueError(
            f"{what} must be [T, K] with K = {len(task_names)} names {tuple(task_names)}; got "
            f"{'shape' if len(shapes) == 1 else 'shapes'} {got}."
        )
    at = np.arange(1, len(values[0]) + 1) if steps is None else np.asarray(steps)
    if at.shape != shapes[0][:1]:
        raise ValueError(
            f"steps must number the {shapes[0][0]} updates; got an array of shape {at.shape}."
        )
    return values, at


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """Panels one above the other, on the same updates."""
    figure = Figure(figsize=(WIDTH, 1.4 + 1.5 * count), layout="constrained")
    each = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    return figure, list(each)


def log_scale(axes: Axes) -> None:
    """A log axis, unless nothing is drawn that has a place on one."""
    if any(np.nanmax(np.asarray(line.get_ydata(), float), initial=0) > 0 for line in axes.lines):
        axes.set_yscale("log")


def weight_limits(axes: Axes, weights: np.ndarray) -> None:
    """From 0 to 1 for weights that share out 1; a line at either end is clear of the frame."""
    if weights.min() >= 0 and 0.5 <= weights.max() <= 1:
        axes.set_ylim(-0.02, 1.02)


def line(task: int) -> dict[str, Any]:
    """Colour and dashes of a task, the same in every picture."""
    dashes = _LINES[task // len(COLORS) % len(_LINES)]
    return {"color": COLORS[task % len(COLORS)], "linestyle": dashes}


def legend(figure: Figure, lines: Sequence[Line2D], names: Sequence[str]) -> None:
    """Above the panels, in as many columns as the names leave room for."""
    shown = [shortened(name, 40) for name in names]
    ncols = columns(shown, WIDTH)
    rows = -(-len(shown) // ncols)
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))  # what it takes, panels keep
    figure.legend(lines, shown, loc="outside upper center", ncols=ncols)


def columns(names: Sequence[str], width: float) -> int:
    """Of a legend that has this much room, in inches."""
    letter, handle = 0.075, 0.55
    fitting = int(width / (letter * max(map(len, names)) + handle))
    return max(1, min(fitting, len(names)))


def strong(axes: Axes, steps: np.ndarray, values: np.ndarray, **line: Any) -> Line2D:
    """A curve; a dot where it has only one point."""
    (drawn,) = axes.plot(steps, values, marker="." if len(values) == 1 else "", **line)
    return drawn


def faint_and_smooth(axes: Axes, steps: np.ndarray, values: np.ndarray, **line: Any) -> Line2D:
    """The raw curve, faint, under its running median, which is returned."""
    axes.plot(steps, values, color=line["color"], alpha=0.2, linewidth=0.5)
    width = max(len(values) // 50, 1)
    usable = len(values) - len(values) % width
    blocks = values[:usable].reshape(-1, width)
    medians = np.full(len(blocks), np.nan)
    some = ~np.isnan(blocks).all(axis=1)
    medians[some] = np.nanmedian(blocks[some], axis=1)
    centers = steps[:usable].reshape(-1, width).mean(axis=1)
    return strong(axes, centers, medians, **{"linewidth": 2, **line})


def positive(values: np.ndarray) -> np.ndarray:
    """Gaps for zeros, which have no place on a log axis."""
    return np.where(values > 0, values, np.nan)


def ratio(values: np.ndarray) -> np.ndarray:
    """Largest over smallest modulus per row, NaN where that is not a number."""
    values = np.abs(values)
    smallest = values.min(axis=1)
    return np.where(smallest > 0, values.max(axis=1) / np.where(smallest > 0, smallest, 1), np.nan)
