"""What a balanced run is doing, as a flat dict of scalars for any logger."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from gaba_jax._checks import path_name
from gaba_jax._state import BalanceState
from gaba_jax._statistics import largest_to_smallest


def balance_metrics(
    opt_state: Any,
    task_names: Sequence[str] | None = None,
    group_names: Sequence[str] | None = None,
) -> dict[str, float | int | Num[Array, ""]]:
    r"""Weights, norms, contributions and cosines of the last update, per task and in sum.

    Those of :func:`task_metrics`, and ``nonfinite_count``, the rejected measurements, and
    ``since_measured``, the updates since the last accepted one, 0 if there was none.

    Any logger takes the dict as it is: ``wandb.log(metrics)``, ``json.dumps(metrics)``, or
    ``writer.add_scalar(key, value, step)`` of tensorboardX for each item. (JSON has no infinity;
    Python writes a ratio that is infinite as ``Infinity``.)

    Args:
      opt_state: any pytree that holds a :class:`gaba_jax.BalanceState`, found by its type. Where
        it holds several, their keys are prefixed by the path, as in ``"0/weight/rul"``.
      task_names: K names, default the positions; see :func:`gaba_jax.task_names`.
      group_names: where weights are per group of parameters (:func:`gaba_jax.by_group`), G names to
        prefix the keys with, as in ``"encoder/weight/rul"``; default the positions; see
        :func:`gaba_jax.group_names`.

    Returns:
      A flat dict of Python numbers, which waits for the update; under ``jit``, of scalar arrays
      (shape []).

    Raises:
      ValueError: there is no BalanceState, or the number of names is not K or not G.

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
        read = ("task_weights", "task_norms", "task_cosines", "nonfinite_count", "since_measured")
        fields = {name: getattr(state, name) for name in read}
        values = {name: jnp.asarray(x) for name, x in fields.items() if x is not None}
        for group, of_group in _groups(values, group_names):
            cosines = of_group.get("task_cosines")
            weights, norms = of_group["task_weights"], of_group["task_norms"]
            of_state = task_metrics(weights, norms, task_names, task_cosines=cosines)
            of_state |= {name: of_group[name] for name in ("nonfinite_count", "since_measured")}
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
    With cosines, as rules on the Gramian measure them: ``cosine/i/j`` per pair of tasks, and
    ``conflict_rate``, the part of the pairs whose cosine is negative.

    Args:
      task_weights: [..., K], ``BalanceState.task_weights``.
      task_norms: [..., K], ``BalanceState.task_norms``.
      task_names: K names, default the positions.
      task_cosines: [..., K, K], ``BalanceState.task_cosines``; default None, not measured.

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
    return metrics
