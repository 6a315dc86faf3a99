"""The train steps that the benchmarks compare: one optimizer, several ways to its gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks._models import Model
from gaba_jax import (
    BalancedGradient,
    balance,
    balanced_value_and_grad,
    task_value_and_grad,
    weighting,
)

# Of balanced_value_and_grad; "plain" is a step with fixed weights, "stacked" the transform.
BALANCED: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, cosines": {},
    "lagged": {"measure": "lagged"},
    "encoder": {"encoder": True},
    "exact, every=10": {"every": 10},
    "exact, held": {"every": 10**9},  # an update that does not measure, alone
}
STACKED = ("stacked", "stacked, cosines")
PATHS = ("plain", "stacked", "exact", "exact, cosines", "lagged", "encoder", "exact, every=10")
Step = Callable[[Any, Any], tuple[Any, jax.Array]]  # (carry, batch) -> (carry, losses)


def make_rule(path: str, num_tasks: int) -> weighting.Weighting:
    """A rule on norms; on the paths named "cosines" one that reads the cosines too."""
    if "cosines" in path:
        return weighting.upgrad(num_tasks)
    return weighting.gaba(num_tasks, min_weight=min(0.05, 0.5 / num_tasks))


def make_step(
    path: str, model: Model, num_tasks: int, measure_on: Any | None = None
) -> tuple[Step, Any]:
    """``(carry, batch) -> (carry, losses)`` and the first carry, to be donated."""
    adamw = optax.adamw(1e-4)
    params = jax.tree.map(jnp.copy, model.params)
    if path == "plain":
        weights = jnp.full(num_tasks, 1 / num_tasks)

        def weighted_sum(params: Any, batch: Any) -> Any:
            losses = jnp.stack(model.whole(params, *batch))
            return weights @ losses, losses

        def step(carry: Any, batch: Any) -> Any:
            params, opt_state = carry
            (_, losses), grads = jax.value_and_grad(weighted_sum, has_aux=True)(params, batch)
            updates, opt_state = adamw.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), losses

        return step, (params, adamw.init(params))
    rule = make_rule(path, num_tasks)
    if path in STACKED:
        tx = optax.chain(balance(rule, measure_on=measure_on), adamw)

        def step(carry: Any, batch: Any) -> Any:
            params, opt_state = carry
            losses, grads = task_value_and_grad(model.whole)(params, *batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), losses

        return step, (params, tx.init(params))
    options = dict(BALANCED[path])
    losses_fn = model.whole
    if "encoder" in options:
        options["encoder"], losses_fn = model.encoder, model.losses_fn
    balanced = balanced_value_and_grad(losses_fn, rule, measure_on=measure_on, **options)

    return balanced_step(balanced, adamw, params)


def balanced_step(
    balanced: BalancedGradient, tx: optax.GradientTransformation, params: Any
) -> tuple[Step, Any]:
    """A step with one balanced gradient, and its first carry."""

    def step(carry: Any, batch: Any) -> Any:
        params, state, opt_state = carry
        (losses, grads), state = balanced.value_and_grad(params, state, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), losses

    return step, (params, balanced.init(params), tx.init(params))
