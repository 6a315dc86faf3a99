"""What a balanced run is doing, as a flat dict of scalars for any logger."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gaba_jax._advance import BalanceState
from gaba_jax._contract import path_name


def balance_metrics(
    opt_state: Any, task_names: Sequence[str] | None = None
) -> dict[str, Float[Array, ""]]:
    r"""Weights, norms and contributions of the last update, per task and in sum.

    Per task i: ``weight/i``, :math:`\lambda_i` as applied; ``norm/i``, :math:`g_i`; ``share/i``,
    :math:`g_i / \sum_j g_j`; ``contribution/i``, :math:`\lambda_i g_i`. Over the tasks:
    ``gradient_ratio``, :math:`\max g / \min g`; ``imbalance``,
    :math:`\max \lambda g / \min \lambda g`, 1 where the tasks pull equally; both infinite where
    only the smaller one is zero, 1 where both are. Tasks of weight 0 do not enter the imbalance.
    And ``nonfinite_count``, the rejected measurements, and ``since_measured``, the updates since
    the last accepted one, 0 if there was none.

    It may be called under ``jit``.

    Args:
      opt_state: any pytree that holds a :class:`gaba_jax.BalanceState`, found by its type. Where
        it holds several, their keys are prefixed by the path, as in ``"0/weight/rul"``.
      task_names: K names, default the positions; see :func:`gaba_jax.task_names`.

    Returns:
      A flat dict of scalars (shape []).

    Raises:
      ValueError: there is no BalanceState, or the number of names is not K.

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
        for key, value in _metrics_of(state, task_names).items():
            metrics[prefix + key] = value
    return metrics


def _metrics_of(state: BalanceState, task_names: Sequence[str] | None) -> dict[str, Array]:
    weights, norms = jnp.asarray(state.task_weights), jnp.asarray(state.task_norms)
    names = [str(i) for i in range(norms.shape[0])] if task_names is None else list(task_names)
    if len(set(names)) != norms.shape[0]:
        raise ValueError(
            f"task_names must be {norms.shape[0]} different names, one per task; got {names}."
        )
    total = jnp.sum(norms)
    vectors = {
        "weight": weights,
        "norm": norms,
        "share": norms / jnp.where(total > 0, total, 1),
        "contribution": weights * norms,
    }
    metrics = {
        f"{key}/{name}": vector[i]
        for key, vector in vectors.items()
        for i, name in enumerate(names)
    }
    metrics["gradient_ratio"] = _ratio(norms)
    # An absent task was left out; it does not make the others unbalanced.
    applied = jnp.abs(weights) > 0
    contributions = jnp.abs(weights * norms)
    metrics["imbalance"] = _ratio(jnp.where(applied, contributions, jnp.max(contributions)))
    metrics["nonfinite_count"] = jnp.asarray(state.nonfinite_count)
    metrics["since_measured"] = jnp.asarray(state.since_measured)
    return metrics


def _ratio(values: Float[Array, " tasks"]) -> Float[Array, ""]:
    largest, smallest = jnp.max(values), jnp.min(values)
    ratio = largest / jnp.where(smallest > 0, smallest, 1)
    return jnp.where(smallest > 0, ratio, jnp.where(largest > 0, jnp.inf, 1))
