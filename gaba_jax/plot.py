"""Pictures of a balanced run, as matplotlib Figures. Nothing here calls ``show``.

Each is 4 inches wide, to be read at 400 pixels; :func:`balance_history` has three panels side by
side, for a page. Save one with ``figure.savefig("weights.png", dpi=200)``.

Needs the extra ``turbofan`` (matplotlib).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from gaba_jax import _drawing as drawing
from gaba_jax import controller
from gaba_jax._diagnosis import shortened
from gaba_jax._drawing import COLORS


@drawing.styled
def weights(
    task_weights: ArrayLike, task_names: Sequence[str], *, steps: ArrayLike | None = None
) -> Figure:
    """The task weights over the updates.

    Args:
      task_weights: [T, K], ``BalanceState.task_weights`` after each update.
      task_names: K names for the legend.
      steps: [T], the numbers of the updates, default 1 to T.

    Returns:
      A Figure with one panel.

    Raises:
      ValueError: the shapes or the number of names do not fit.

    Example:
      >>> import numpy as np
      >>> from gaba_jax import plot
      >>> figure = plot.weights(np.full((10, 2), 0.5), ["rul", "health"])
      >>> figure.axes[0].get_ylabel()
      'task weight'
    """
    (values,), at = drawing.over_steps({"task_weights": task_weights}, task_names, steps)
    figure, (axes,) = drawing.panels(1)
    lines = [
        drawing.strong(axes, at, values[:, i], linewidth=1.5, **drawing.line(i))
        for i in range(len(task_names))
    ]
    axes.set(ylabel="task weight", xlabel="update")
    drawing.weight_limits(axes, values)
    drawing.legend(figure, lines, task_names)
    return figure


@drawing.styled
def norms(
    task_norms: ArrayLike, task_names: Sequence[str], *, steps: ArrayLike | None = None
) -> Figure:
    """The gradient norms and the ratio of the largest to the smallest, on log axes.

    Every update faint, and the medians of 50 blocks of updates. Zeros leave gaps.

    Args:
      task_norms: [T, K], ``BalanceState.task_norms`` after each update.
      task_names: K names for the legend.
      steps: [T], the numbers of the updates, default 1 to T.

    Returns:
      A Figure with two panels, one above the other.

    Raises:
      ValueError: the shapes or the number of names do not fit.
    """
    (values,), at = drawing.over_steps({"task_norms": task_norms}, task_names, steps)
    figure, (above, below) = drawing.panels(2)
    lines = [
        drawing.faint_and_smooth(above, at, drawing.positive(values[:, i]), **drawing.line(i))
        for i in range(len(task_names))
    ]
    drawing.faint_and_smooth(below, at, drawing.ratio(values), color=COLORS[6])
    above.set(ylabel="gradient norm")
    below.set(ylabel="largest / smallest", xlabel="update")
    for axes in (above, below):
        drawing.log_scale(axes)
    drawing.legend(figure, lines, task_names)
    return figure


@drawing.styled
def contributions(
    task_norms: ArrayLike,
    task_weights: ArrayLike,
    task_names: Sequence[str],
    *,
    steps: ArrayLike | None = None,
) -> Figure:
    r"""How hard each task pulls, before and after weighting, on log axes of one range.

    Before: :math:`g_i / K`, what equal weights would make of the norms. After:
    :math:`|\lambda_i| g_i`, as applied.

    Args:
      task_norms: [T, K], ``BalanceState.task_norms`` after each update.
      task_weights: [T, K], ``BalanceState.task_weights`` likewise.
      task_names: K names for the legend.
      steps: [T], the numbers of the updates, default 1 to T.

    Returns:
      A Figure with two panels, one above the other.

    Raises:
      ValueError: the shapes or the number of names do not fit.
    """
    (pulls, factors), at = drawing.over_steps(
        {"task_norms": task_norms, "task_weights": task_weights}, task_names, steps
    )
    figure, (before, after) = drawing.panels(2, sharey=True)
    both = ((before, pulls / len(task_names)), (after, np.abs(pulls * factors)))
    lines = [
        drawing.faint_and_smooth(axes, at, drawing.positive(values[:, i]), **drawing.line(i))
        for axes, values in both
        for i in range(len(task_names))
    ]
    before.set(ylabel="equal weights")
    after.set(ylabel="as weighted", xlabel="update")
    drawing.log_scale(before)  # of both, which share it
    figure.supylabel("weight x gradient norm", fontsize=9)
    drawing.legend(figure, lines[: len(task_names)], task_names)
    return figure


@drawing.styled
def shares(
    task_norms: ArrayLike,
    task_weights: ArrayLike,
    task_names: Sequence[str],
    *,
    reference: ArrayLike | None = None,
    steps: ArrayLike | None = None,
) -> Figure:
    r"""The tasks' shares of the norms and of the contributions, against their reference.

    In the words of :mod:`gaba_jax.controller`: what is measured, :math:`s_i = g_i / \sum_j g_j`,
    and what control makes of it, :math:`|\lambda_i| g_i / \sum_j |\lambda_j| g_j`. Dashed the set
    point, on which the shares of the contributions lie at balance.

    Args:
      task_norms: [T, K], ``BalanceState.task_norms`` after each update.
      task_weights: [T, K], ``BalanceState.task_weights`` likewise.
      task_names: K names for the legend.
      reference: [K] wanted shares, default 1/K each.
      steps: [T], the numbers of the updates, default 1 to T.

    Returns:
      A Figure with two panels, one above the other.

    Raises:
      ValueError: the shapes or the number of names do not fit.
    """
    (pulls, factors), at = drawing.over_steps(
        {"task_norms": task_norms, "task_weights": task_weights}, task_names, steps
    )
    num_tasks = len(task_names)
    wanted = np.full(num_tasks, 1 / num_tasks) if reference is None else np.asarray(reference)
    if wanted.shape != (num_tasks,):
        raise ValueError(
            f"reference must be [{num_tasks}] shares, one per task; got shape {wanted.shape}."
        )
    figure, panels = drawing.panels(2)
    labels = ("share of norms", "share of contributions")
    lines: list[Line2D] = []
    for axes, values, label in zip(panels, (pulls, np.abs(pulls * factors)), labels, strict=True):
        parts = np.asarray(controller.share(values))
        lines = [
            drawing.faint_and_smooth(axes, at, parts[:, i], **drawing.line(i))
            for i in range(num_tasks)
        ]
        for level in np.unique(wanted):
            lines.append(
                axes.axhline(level, color="0.35", linestyle=(0, (4, 3)), linewidth=1, zorder=3)
            )
        axes.set(ylabel=label, ylim=(-0.02, 1.02))
    panels[-1].set_xlabel("update")
    drawing.legend(figure, lines[: num_tasks + 1], [*task_names, "reference"])
    return figure


@drawing.styled
def cosine_matrix(task_cosines: ArrayLike, task_names: Sequence[str]) -> Figure:
    """The cosines between the task gradients: blue where tasks agree, red where they oppose.

    Args:
      task_cosines: [K, K], such as ``BalanceState.task_cosines``, or of a
        :class:`gaba_jax.Diagnosis` the median over the batches.
      task_names: K names for rows and columns.

    Returns:
      A Figure with one panel and its scale. Up to 8 tasks the numbers are in the cells.

    Raises:
      ValueError: the shape or the number of names does not fit.

    Example:
      >>> from gaba_jax import plot
      >>> figure = plot.cosine_matrix([[1.0, -0.3], [-0.3, 1.0]], ["rul", "health"])
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['1.00', '-0.30', '-0.30', '1.00']
    """
    cosines, num_tasks = np.asarray(task_cosines, float), len(task_names)
    if cosines.shape != (num_tasks, num_tasks):
        raise ValueError(
            f"task_cosines must be [K, K] with K = {num_tasks} names {tuple(task_names)}; got "
            f"shape {cosines.shape}."
        )
    figure = Figure(figsize=(drawing.WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
    names = [shortened(name, 14) for name in task_names]
    axes.set(xticks=range(num_tasks), yticks=range(num_tasks), yticklabels=names)
    upright = sum(map(len, names)) <= 24
    axes.set_xticklabels(names, rotation=0 if upright else 90)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    if num_tasks <= 8:
        for (row, column), value in np.ndenumerate(cosines):
            color = "white" if abs(value) > 0.6 else "black"
            size = 9 if num_tasks <= 5 else 7
            text = f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    figure.colorbar(image, label="cosine", ticks=[-1, -0.5, 0, 0.5, 1])
    return figure


@drawing.styled
def step_response(beta: float = 0.99, *, start: float = 0.0, target: float = 1.0) -> Figure:
    """How the average follows a jump of its input; :func:`gaba_jax.controller.step_response`.

    Marked are half of the way, the time constant (63 %) and the settling within 2 %.

    Args:
      beta: decay of the average in (0, 1), default 0.99.
      start: the average before the jump, default 0.
      target: the new input, default 1.

    Returns:
      A Figure with one panel.

    Raises:
      ValueError: ``beta`` is not in (0, 1), or ``start`` equals ``target``.

    Example:
      >>> from gaba_jax import plot
      >>> figure = plot.step_response(0.9, start=0.5, target=0.05)
      >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()][-1]
      '98 %: 38 updates'
    """
    if not 0 < beta < 1:
        raise ValueError(f"{beta=} must be in (0, 1): without an average there is no response.")
    if start == target:
        raise ValueError(f"{start=} equals target={target}: there is no jump to follow.")
    settled = int(controller.settling_steps(beta))
    at = np.linspace(0, 1.3 * settled, 400)

    def response(updates: Any) -> np.ndarray:
        values = controller.step_response(updates, start=start, target=target, beta=beta)
        return np.asarray(values)

    figure, (axes,) = drawing.panels(1)
    axes.plot(at, response(at), color=COLORS[0], linewidth=1.5, label=f"average, beta = {beta:g}")
    axes.axhline(
        target, color="0.35", linestyle=(0, (4, 3)), linewidth=1, zorder=1, label="new input"
    )
    marked = [
        ("50 %", float(controller.half_life(beta)), "o", COLORS[2]),
        ("63 %", float(controller.time_constant(beta)), "s", COLORS[3]),
        ("98 %", float(settled), "^", COLORS[1]),
    ]
    for part, update, marker, color in marked:
        label = f"{part}: {update:.3g} updates"
        axes.plot([update], [response(update)], marker, color=color, zorder=3, label=label)
    axes.set(xlabel="updates since the jump", ylabel="average")
    axes.margins(x=0, y=0.08)
    axes.legend(loc="lower right" if target > start else "upper right")
    return figure


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
