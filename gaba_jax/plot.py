"""Pictures of a balanced run, as matplotlib Figures. Nothing here calls ``show``.

The one of :func:`history` is 4 inches wide, to be read at 400 pixels; that of
:func:`balance_history` has its panels side by side, for a page. Save one with
``figure.savefig("weights.png", dpi=200)``.

Needs the extra ``turbofan`` (matplotlib).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from gaba_jax import _drawing as drawing
from gaba_jax._drawing import COLORS
from gaba_jax._findings import shortened


@drawing.styled
def balance_history(
    task_norms: ArrayLike, task_weights: ArrayLike, task_names: Sequence[str]
) -> Figure:
    """Gradient norms, their ratio before and after balancing, and the weights, over the updates.

    Args:
      task_norms: [T, K], ``BalanceState.task_norms`` after each update.
      task_weights: [T, K], ``BalanceState.task_weights`` after each update.
      task_names: K names for the legends.

    Returns:
      A Figure with three panels side by side, 10 inches wide.

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
    (norms, weights), steps = drawing.over_steps(
        {"task_norms": task_norms, "task_weights": task_weights}, task_names, None
    )
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    norm_axes, ratio_axes, weight_axes = figure.subplots(1, 3)
    shown = [shortened(name, 24) for name in task_names]
    for i, name in enumerate(shown):
        line = drawing.line(i) | {"label": name}
        drawing.faint_and_smooth(norm_axes, steps, drawing.positive(norms[:, i]), **line)
        drawing.strong(weight_axes, steps, weights[:, i], linewidth=2, **line)
    for values, color, label in [
        (norms, COLORS[6], "gradients"),
        (norms * weights, COLORS[2], "weighted"),
    ]:
        drawing.faint_and_smooth(ratio_axes, steps, drawing.ratio(values), color=color, label=label)
    norm_axes.set(ylabel="gradient norm")
    ratio_axes.set(ylabel="largest / smallest")
    weight_axes.set(ylabel="task weight")
    for axes in (norm_axes, ratio_axes):
        drawing.log_scale(axes)
    drawing.weight_limits(weight_axes, weights)
    for axes in figure.axes:
        axes.set_xlabel("update")
        columns = 2 if axes is ratio_axes else drawing.columns(shown, 3.0)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)
    return figure


@drawing.styled
def history(
    metrics: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    *,
    steps: ArrayLike | None = None,
    prefix: str = "",
) -> Figure:
    r"""Weights, gradient norms and contributions of a run, from what was logged of it.

    Norms and contributions :math:`|\lambda_i| g_i` are on log axes: every update faint, and the
    medians of 50 blocks of updates. Zeros leave gaps. The arrays of a run that was not logged are
    drawn by :func:`balance_history`.

    Args:
      metrics: what :func:`gaba_jax.balance_metrics` returned, one dict for each logged update, or
        one dict of arrays [T], as ``jax.lax.scan`` stacks them. The tasks and their names are those
        of the keys; other keys are not read.
      steps: [T], the numbers of these updates, default 1 to T.
      prefix: what stands before the keys where a state holds several, as ``"0/"``.

    Returns:
      A Figure with three panels, one above the other.

    Raises:
      ValueError: there is no dict, the keys of a balanced run are not in it, or not in every one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import balance_metrics, gaba, plot
      >>> tx, params, logged = gaba(), jnp.zeros(2), []
      >>> state = tx.init(params)
      >>> for update in range(20):
      ...     grads = jnp.array([[30.0, 40.0], [0.0, 1.0 + update]])
      ...     _, state = tx.update(grads, state, params)
      ...     logged.append(balance_metrics(state, ["rul", "health"]))
      >>> figure = plot.history(logged)
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['task weight', 'gradient norm', 'contribution']
    """
    found = _columns(metrics)
    start = f"{prefix}weight/"
    names = [key.removeprefix(start) for key in found if key.startswith(start)]
    if not names:
        raise ValueError(
            f"metrics must be dicts of balance_metrics with keys {start}...; got "
            f"{sorted(found) or 'none'}."
        )
    arrays: dict[str, ArrayLike] = {}
    for kind in ("weight", "norm", "contribution"):
        keys = [f"{prefix}{kind}/{name}" for name in names]
        missing = [key for key in keys if key not in found]
        if missing:
            raise ValueError(f"not every update in metrics has the key {missing[0]!r}.")
        arrays[kind] = np.stack([np.asarray(found[key], float) for key in keys], axis=-1)
    values, at = drawing.over_steps(arrays, names, steps)
    figure, panels = drawing.panels(3)
    lines = [
        drawing.strong(panels[0], at, values[0][:, i], linewidth=1.5, **drawing.line(i))
        for i in range(len(names))
    ]
    for axes, rows in zip(panels[1:], values[1:], strict=True):
        for i in range(len(names)):
            pulls = drawing.positive(np.abs(rows[:, i]))
            drawing.faint_and_smooth(axes, at, pulls, **drawing.line(i))
        drawing.log_scale(axes)
    drawing.weight_limits(panels[0], values[0])
    for axes, label in zip(panels, ("task weight", "gradient norm", "contribution"), strict=True):
        axes.set_ylabel(label)
    panels[-1].set_xlabel("update")
    drawing.legend(figure, lines, names)
    return figure


def _columns(metrics: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> dict[str, Any]:
    """The values of every update by key, for the keys that all updates have."""
    if isinstance(metrics, Mapping):
        return dict(metrics)
    common = [key for key in (metrics[0] if metrics else {}) if all(key in m for m in metrics)]
    return {key: [each[key] for each in metrics] for key in common}
