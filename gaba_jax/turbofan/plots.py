"""Pictures of what the turbofan model predicts, as matplotlib Figures."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from gaba_jax import _drawing as drawing
from gaba_jax.plot import COLORS
from gaba_jax.turbofan.data import HEALTH_NAMES
from gaba_jax.turbofan.metrics import confusion_matrix as count_confusions


def predicted_against_true(predicted_rul: ArrayLike, true_rul: ArrayLike) -> Figure:
    """Predicted against true RUL, one dot per engine.

    Args:
      predicted_rul: [N], cycles.
      true_rul: [N], cycles.

    Returns:
      A Figure; dots above the diagonal are late predictions.
    """
    predicted, true = np.asarray(predicted_rul), np.asarray(true_rul)
    figure = Figure(figsize=(4.5, 4.2), layout="constrained")
    axes = figure.subplots()
    limit = float(max(predicted.max(), true.max())) * 1.05
    axes.plot([0, limit], [0, limit], color=COLORS[6], linewidth=1)
    late = predicted > true
    for dots, color, label in [(late, COLORS[1], "late"), (~late, COLORS[0], "early")]:
        axes.scatter(true[dots], predicted[dots], color=color, s=16, alpha=0.8, label=label)
    axes.set(
        xlabel="true RUL (cycles)",
        ylabel="predicted RUL (cycles)",
        xlim=(0, limit),
        ylim=(min(0.0, float(predicted.min())), limit),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


@drawing.styled
def learning_curves(losses: ArrayLike, task_names: Sequence[str]) -> Figure:
    """The training loss of each task over the updates, each on an axis of its own.

    Every update faint, and the medians of 50 blocks of updates.

    Args:
      losses: [T, K], after each update.
      task_names: K names.

    Returns:
      A Figure with K panels, one above the other.

    Raises:
      ValueError: the shape or the number of names does not fit.

    Example:
      >>> import numpy as np
      >>> from gaba_jax.turbofan import plots
      >>> figure = plots.learning_curves(np.ones((10, 2)), ["rul", "health"])
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['rul loss', 'health loss']
    """
    (values,), at = drawing.over_steps({"losses": losses}, task_names, None)
    figure = Figure(figsize=(drawing.WIDTH, 0.6 + 1.9 * len(task_names)), layout="constrained")
    panels = figure.subplots(len(task_names), 1, sharex=True, squeeze=False)[:, 0]
    for i, (axes, name) in enumerate(zip(panels, task_names, strict=True)):
        drawing.faint_and_smooth(axes, at, drawing.positive(values[:, i]), **drawing.line(i))
        axes.set_ylabel(f"{name} loss")
        drawing.log_scale(axes)
    panels[-1].set_xlabel("update")
    return figure


def confusion_matrix(predicted_health: ArrayLike, true_health: ArrayLike) -> Figure:
    """True against predicted health state, with counts.

    Args:
      predicted_health: [N], class numbers 0 to 2.
      true_health: [N], class numbers 0 to 2.

    Returns:
      A Figure; rows are the true states.
    """
    counts = count_confusions(np.asarray(predicted_health), np.asarray(true_health))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(4.5, 3.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color)
    axes.set(
        xticks=range(len(HEALTH_NAMES)),
        yticks=range(len(HEALTH_NAMES)),
        xticklabels=HEALTH_NAMES,
        yticklabels=HEALTH_NAMES,
        xlabel="predicted",
        ylabel="true",
    )
    figure.colorbar(image, label="share of the true state")
    return figure
