"""Pictures of a balanced run, as matplotlib Figures. Nothing here calls ``show``.

Needs the extra ``turbofan`` (matplotlib).
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

# Okabe and Ito's palette: told apart under every kind of colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def balance_history(
    task_norms: ArrayLike, task_weights: ArrayLike, task_names: Sequence[str]
) -> Figure:
    """Gradient norms, their ratio before and after balancing, and the weights, over the updates.

    Args:
      task_norms: [T, K], ``BalanceState.task_norms`` after each update.
      task_weights: [T, K], ``BalanceState.task_weights`` after each update.
      task_names: K names for the legends.

    Returns:
      A Figure with three panels.

    Raises:
      ValueError: the shapes or the number of names do not fit.

    Example:
      >>> import numpy as np
      >>> from gaba_jax import plot
      >>> norms, weights = np.ones((10, 2)), np.full((10, 2), 0.5)
      >>> figure = plot.balance_history(norms, weights, ["rul", "health"])
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['gradient norm', 'largest / smallest', 'task weight']
    """
    norms, weights = np.asarray(task_norms, float), np.asarray(task_weights, float)
    if norms.ndim != 2 or norms.shape != weights.shape or norms.shape[1] != len(task_names):
        raise ValueError(
            f"task_norms and task_weights must be [T, K] with K = {len(task_names)} names "
            f"{tuple(task_names)}; got shapes {norms.shape} and {weights.shape}."
        )
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    norm_axes, ratio_axes, weight_axes = figure.subplots(1, 3)
    steps = np.arange(1, len(norms) + 1)
    for i, name in enumerate(task_names):
        color = COLORS[i % len(COLORS)]
        _faint_and_smooth(norm_axes, steps, norms[:, i], color, name)
        weight_axes.plot(steps, weights[:, i], color=color, label=name, linewidth=2)
    for values, color, label in [
        (norms, COLORS[6], "gradients"),
        (norms * weights, COLORS[2], "weighted"),
    ]:
        _faint_and_smooth(ratio_axes, steps, _ratio(values), color, label)
    norm_axes.set(ylabel="gradient norm", yscale="log")
    ratio_axes.set(ylabel="largest / smallest", yscale="log")
    weight_axes.set(ylabel="task weight", ylim=(0, 1))
    for axes in figure.axes:
        axes.set_xlabel("update")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return figure


def _faint_and_smooth(
    axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str
) -> None:
    """The raw curve, faint, under its running median; zeros have no place on a log axis."""
    values = np.where(values > 0, values, np.nan)
    axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.5)
    width = max(len(values) // 50, 1)
    usable = len(values) - len(values) % width
    blocks = values[:usable].reshape(-1, width)
    filled = ~np.isnan(blocks).all(axis=1)
    centers = steps[:usable].reshape(-1, width).mean(axis=1)[filled]
    axes.plot(centers, np.nanmedian(blocks[filled], axis=1), color=color, label=label, linewidth=2)


def _ratio(values: np.ndarray) -> np.ndarray:
    """Largest over smallest per row, NaN where that is not a number."""
    smallest = values.min(axis=1)
    return np.where(smallest > 0, values.max(axis=1) / np.where(smallest > 0, smallest, 1), np.nan)
