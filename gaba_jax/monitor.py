"""What a balanced run is doing, as a flat dict of scalars for any logger."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from gaba_jax._checks import path_name
from gaba_jax._state import BalanceState
from gaba_jax._statistics import largest_to_smallest

_ROUNDING = 1e-6  # of a weight that is set to its floor in float32


def balance_metrics(
    opt_state: Any,
    task_names: Sequence[str] | None = None,
    group_names: Sequence[str] | None = None,
    *,
    min_weight: float = 0.0,
) -> dict[str, float | int | Num[Array, ""]]:
    r"""Weights, norms, contributions and cosines of the last update, per task and in sum.

    Those of :func:`task_metrics`, and:

    * ``nonfinite_count``, the rejected measurements.
    * ``since_measured``, the updates since the last accepted one, 0 if there was none.
    * ``at_bound``, 1 where the rule last gave some task a weight of ``min_weight`` or less (in
      absolute value), else 0. By default that is a task which the rule shut off. Give the floor of
      your rule, which the state does not know, to see whether it decides in the rule's place.

    Any logger takes the dict as it is: ``wandb.log(metrics)``, ``json.dumps(metrics)``, or
    ``writer.add_scalar(key, value, step)`` of tensorboardX for each item. (JSON has no infinity;
    Python writes a ratio that is infinite as ``Infinity``.) A list of such dicts is what
    :func:`gaba_jax.plot.history` draws.

    Args:
      opt_state: any pytree that holds a :class:`gaba_jax.BalanceState`, found by its type. Where
        it holds several, their keys are prefixed by the path, as in ``"0/weight/rul"``.
      task_names: K names, default the positions; see :func:`gaba_jax.task_names`.
      group_names: where weights are per group of parameters (:func:`gaba_jax.by_group`), G names to
        prefix the keys with, as in ``"encoder/weight/rul"``; default the positions; see
        :func:`gaba_jax.group_names`.
      min_weight: what ``at_bound`` compares with, default 0; the ``min_weight`` of
        :func:`gaba_jax.gaba` or :func:`gaba_jax.weighting.stabilize`, if the rule has one. Under
        the floor "renormalize" clamped weights end a little below it, and count.

    Returns:
      A flat dict of Python numbers, which waits for the update; under ``jit``, of scalar arrays
      (shape []).

    Raises:
      ValueError: there is no BalanceState, the number of names is not K or not G, or ``min_weight``
        is negative.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import balance_metrics, gaba
      >>> tx = optax.chain(gaba(beta=0.0, warmup_steps=0, min_weight=0.0), optax.sgd(1e-3))
      >>> grads = {"w": jnp.array([[3.0, 4.0], [0.0, 0.01]])}
      >>> _, opt_state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
      >>> metrics = balance_metrics(opt_state, ["rul", "health"])
      >>> print(f"{metrics['gradient_ratio']:.0f} {metrics['weight/health']:.3f}")
      500 0.998
    """
    if not min_weight >= 0:
        raise ValueError(f"{min_weight=} must be at least 0: it is the floor of the weights.")
    found = [
        (path, state)
        for path, state in jax.tree.leaves_with_path(
            opt_state, is_leaf=lambda node: isinstance(node, BalanceState)
        )
        if isinstance(state, BalanceState)
    ]
    if not found:
        raise ValueError(
            "opt_state holds no BalanceState. Pass the state of a chain that starts with gaba() "
            "or balance(...)."
        )
    metrics: dict[str, Array] = {}
    for path, state in found:
        prefix = path_name(path).replace(".", "/") + "/" if len(found) > 1 else ""
        # Inside an nnx.Optimizer the fields are variables.
        read = ("task_weights", "next_task_weights", "task_norms", "task_cosines")
        read = (*read, "nonfinite_count", "since_measured")
        fields = {name: getattr(state, name) for name in read}
        values = {name: jnp.asarray(x) for name, x in fields.items() if x is not None}
        for group, of_group in _groups(values, group_names):
            cosines = of_group.get("task_cosines")
            weights, norms = of_group["task_weights"], of_group["task_norms"]
            of_state = task_metrics(weights, norms, task_names, task_cosines=cosines)
            of_state |= {name: of_group[name] for name in ("nonfinite_count", "since_measured")}
            # Those before tasks were left out: an absent task has weight 0 for this update alone.
            kept = jnp.abs(of_group["next_task_weights"])
            of_state["at_bound"] = jnp.any(kept <= min_weight * (1 + _ROUNDING)).astype(jnp.int32)
            metrics |= {prefix + group + key: value for key, value in of_state.items()}
    if any(isinstance(value, Tracer) for value in metrics.values()):
        return dict(metrics)
    return {key: value.item() for key, value in jax.device_get(metrics).items()}


def _groups(
    values: dict[str, Array], group_names: Sequence[str] | None
) -> list[tuple[str, dict[str, Array]]]:
    """(prefix, fields) of each group; the fields as they are, without a prefix, if there is one."""
    weights = values["task_weights"]
    if weights.ndim == 1:
        return [("", values)]
    number = len(weights)
    names = [str(i) for i in range(number)] if group_names is None else list(group_names)
    if len(names) != number or len(set(names)) != number:
        raise ValueError(
            f"group_names must be {number} different names, one per group of parameters; got "
            f"{names}. group_names(params, groups) gives them."
        )
    return [
        (name.replace(".", "/") + "/", {key: value[i] for key, value in values.items()})
        for i, name in enumerate(names)
    ]


def task_metrics(
    task_weights: ArrayLike,
    task_norms: ArrayLike,
    task_names: Sequence[str] | None = None,
    *,
    task_cosines: ArrayLike | None = None,
) -> dict[str, Float[Array, "..."]]:
    r"""The metrics of recorded weights and norms, of one update or of many at once.

    Per task i: ``weight/i``, :math:`\lambda_i` as applied; ``norm/i``, :math:`g_i`; ``share/i``,
    :math:`g_i / \sum_j g_j`; ``contribution/i``, :math:`\lambda_i g_i`. Over the tasks:
    ``gradient_ratio``, :math:`\max g / \min g`; ``imbalance``,
    :math:`\max \lambda g / \min \lambda g`, 1 where the tasks pull equally; both infinite where
    only the smaller one is zero, 1 where both are. Tasks of weight 0 do not enter the imbalance.
    With cosines :math:`c_{ij}`, as rules on the Gramian measure them:

    * ``cosine/i/j`` per pair of tasks, and ``conflict_rate``, the part of the pairs whose cosine is
      negative.
    * ``alignment``, the gradient alignment score of Wang et al. 2025 over the n tasks that have a
      gradient:

      .. math:: 2\, \Big\| \frac{1}{n} \sum_i \frac{g_i}{\|g_i\|} \Big\|^2 - 1
          = \frac{2}{n^2} \sum_{ij} c_{ij} - 1

      It is 1 where all point the same way, and -1 where the unit gradients cancel. For two tasks it
      is their cosine; n orthogonal ones have 2/n - 1. With fewer than two gradients it is 1.
    * ``decrease/i``, :math:`g_i \sum_j \lambda_j g_j c_{ij}`, the inner product of the gradient of
      task i and the update. To first order it is by how much the loss of task i falls per unit of
      learning rate, under plain SGD and on the measured parameters. It is negative where the update
      raises that loss.

    Args:
      task_weights: [..., K], ``BalanceState.task_weights``.
      task_norms: [..., K], ``BalanceState.task_norms``.
      task_names: K names, default the positions.
      task_cosines: [..., K, K], ``BalanceState.task_cosines``; default None, not measured. An
        absent task keeps its last norm and cosines, and what follows from them is of that gradient.

    Returns:
      A flat dict of arrays [...], scalars for one update.

    Raises:
      ValueError: the number of names is not K, or two are the same.

    Example:
      >>> import numpy as np
      >>> from gaba_jax import monitor
      >>> weights, norms = np.array([[0.5, 0.5], [0.1, 0.9]]), np.array([[9.0, 1.0], [9.0, 1.0]])
      >>> metrics = monitor.task_metrics(weights, norms)
      >>> print(metrics["gradient_ratio"], metrics["imbalance"].round(3))
      [9. 9.] [9. 1.]

    References:
      S. Wang, A. Bhartari, B. Li, P. Perdikaris, "Gradient alignment in physics-informed neural
      networks: a second-order optimization perspective", 2025, arXiv:2502.00604.
    """
    weights, norms = jnp.asarray(task_weights), jnp.asarray(task_norms)
    num_tasks = norms.shape[-1]
    names = [str(i) for i in range(num_tasks)] if task_names is None else list(task_names)
    if len(names) != num_tasks or len(set(names)) != num_tasks:
        raise ValueError(
            f"task_names must be {num_tasks} different names, one per task; got {names}."
        )
    total = jnp.sum(norms, axis=-1, keepdims=True)
    contributions = weights * norms
    per_task = {
        "weight": weights,
        "norm": norms,
        "share": norms / jnp.where(total > 0, total, 1),
        "contribution": contributions,
    }
    metrics = {
        f"{key}/{name}": values[..., i]
        for key, values in per_task.items()
        for i, name in enumerate(names)
    }
    metrics["gradient_ratio"] = largest_to_smallest(norms)
    # An absent task was left out; it does not make the others unbalanced.
    applied, strength = jnp.abs(weights) > 0, jnp.abs(contributions)
    largest = jnp.max(strength, axis=-1, keepdims=True)
    metrics["imbalance"] = largest_to_smallest(jnp.where(applied, strength, largest))
    if task_cosines is not None:
        cosines = jnp.asarray(task_cosines)
        pairs = list(itertools.combinations(range(num_tasks), 2))
        for i, j in pairs:
            metrics[f"cosine/{names[i]}/{names[j]}"] = cosines[..., i, j]
        conflicts = [(cosines[..., i, j] < 0).astype(jnp.float32) for i, j in pairs]
        metrics["conflict_rate"] = sum(conflicts, jnp.zeros(norms.shape[:-1])) / max(len(pairs), 1)
        metrics["alignment"] = _alignment(cosines, norms > 0)
        decreases = norms * jnp.sum(cosines * contributions[..., None, :], axis=-1)
        metrics |= {f"decrease/{name}": decreases[..., i] for i, name in enumerate(names)}
    return metrics


def _alignment(
    cosines: Float[Array, "... tasks tasks"], known: Bool[Array, "... tasks"]
) -> Float[Array, "..."]:
    """The gradient alignment score of the tasks that have a gradient."""
    pairs = known[..., :, None] & known[..., None, :]
    count = jnp.sum(known, axis=-1).astype(cosines.dtype)
    total = jnp.sum(jnp.where(pairs, cosines, 0), axis=(-2, -1))
    score = 2 * total / jnp.maximum(count, 1) ** 2 - 1
    return jnp.where(count >= 2, jnp.clip(score, -1, 1), 1)
