"""The train steps that the benchmarks compare: one optimizer, several ways to its gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks._models import Model
from gaba_jax import balanced_value_and_grad, gaba, task_value_and_grad, weighting

# Of balanced_value_and_grad; "plain" is a step with fixed weights, "stacked" the transform.
BALANCED: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, ghost norms": {"norms": "ghost"},
    "lagged": {"measure": "lagged"},
    "encoder": {"encoder": True},
    "exact, every=10": {"every": 10},
}
PATHS = ("plain", "stacked", *BALANCED)
Step = Callable[[Any, Any], tuple[Any, jax.Array]]  # (carry, batch) -> (carry, losses)


def make_step(path: str, model: Model, num_tasks: int) -> tuple[Step, Any]:
    """``(carry, batch) -> (carry, losses)`` and the first carry, to be donated."""
    adamw = optax.adamw(1e-4)
    floor = min(0.05, 0.5 / num_tasks)
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
    if path == "stacked":
        tx = optax.chain(gaba(num_tasks, min_weight=floor), adamw)

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
    rule = weighting.gaba(num_tasks, min_weight=floor)
    balanced = balanced_value_and_grad(losses_fn, rule, **options)

    def step(carry: Any, batch: Any) -> Any:
        params, state, opt_state = carry
        (losses, grads), state = balanced.value_and_grad(params, state, *batch)
        updates, opt_state = adamw.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), losses

    return step, (params, balanced.init(params), adamw.init(params))
