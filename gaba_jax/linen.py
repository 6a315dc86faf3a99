"""A Flax Linen train state that hands losses and masks to the optimizer. Imports flax."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax._selection import OVERWRITTEN
from gaba_jax._statistics import weighted, whole_leaves


class TrainState(train_state.TrainState):
    """Flax's train state, whose ``apply_gradients`` passes ``task_losses`` and ``task_mask`` on.

    Flax's own has no way to pass them to ``tx.update``, so that a weighting which needs losses
    raises there. Everything else is as in ``flax.training.train_state.TrainState``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import gradnorm, task_value_and_grad
      >>> from gaba_jax.linen import TrainState
      >>> def losses_fn(params):
      ...     return jnp.sum(params["w"] ** 2), jnp.sum((params["w"] - 1) ** 2)
      >>> state = TrainState.create(
      ...     apply_fn=None, params={"w": jnp.ones(3)}, tx=optax.chain(gradnorm(), optax.sgd(0.1)))
      >>> losses, grads = task_value_and_grad(losses_fn)(state.params)
      >>> state = state.apply_gradients(grads=grads, task_losses=losses)
      >>> int(state.step)
      1
    """

    def apply_gradients(
        self,
        *,
        grads: Any,
        task_losses: ArrayLike | None = None,
        task_mask: ArrayLike | None = None,
        **kwargs: Any,
    ) -> "TrainState":
        r"""One step of the optimizer.

        Args:
          grads: what ``tx`` takes: leaves [K, \*param.shape] where balancing comes first.
          task_losses: [K], for weightings that need them.
          task_mask: [K] bool, the tasks of this batch, default all.
          **kwargs: fields to replace in the result; others are extra arguments of ``tx.update``,
            such as the ``value`` of ``optax.contrib.reduce_on_plateau``.

        Returns:
          The state after the step.

        Raises:
          ValueError: when the step is traced, the weighting needs ``task_losses`` and got none, or
            nothing in ``tx`` takes the task axis away.
        """
        given = {"task_losses": task_losses, "task_mask": task_mask}
        given = {name: value for name, value in given.items() if value is not None}
        fields = {field.name for field in dataclasses.fields(self)}
        given |= {name: kwargs.pop(name) for name in [*kwargs] if name not in fields}
        tx = optax.with_extra_args_support(self.tx)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            return tx.update(updates, state, params, **given)

        with_given = self.replace(tx=optax.GradientTransformation(tx.init, update))
        if isinstance(grads, Mapping) and OVERWRITTEN in grads:
            new, old = grads[OVERWRITTEN], self.params[OVERWRITTEN]
            new = jax.tree.map(lambda new, old: _of_any_task(new, old, task_mask), new, old)
            grads = {**grads, OVERWRITTEN: new}
        stepped = super(TrainState, with_given).apply_gradients(grads=grads, **kwargs)
        before, after = ([jnp.shape(p) for p in jax.tree.leaves(s.params)] for s in (self, stepped))
        if before != after:
            raise ValueError(
                "the updates still have a task axis, which parameters would take on: put gaba() or "
                "balance(...) first in the chain of tx."
            )
        return stepped.replace(tx=self.tx)


def _of_any_task(values: Array, old: Array, task_mask: ArrayLike | None) -> Array:
    """Stacked new values of what is overwritten: the largest, as by both drivers."""
    if jnp.shape(values) == jnp.shape(old):
        return values
    usable = None if task_mask is None else jnp.asarray(task_mask)
    return weighted(whole_leaves([values])[0], None, usable)
