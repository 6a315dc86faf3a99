"""Gradient accumulation around a balancing transform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from gaba_jax._checks import check_stacked, each_task
from gaba_jax._state import task_presence


class TaskMultiStepsState(NamedTuple):
    r"""State of :class:`TaskMultiSteps`: that of ``optax.MultiSteps``, and whose labels came.

    Attributes:
      mini_step: [] int32, mini-steps since the last update.
      gradient_step: [] int32, updates so far.
      inner_opt_state: the state of the wrapped transform.
      acc_grads: leaves [K, \*param.shape], the gradients of the mini-steps so far.
      skip_state: of ``should_skip_update_fn``.
      task_counts: [K] int32, the mini-steps so far in which each task was present.
    """

    mini_step: Int[Array, ""]
    gradient_step: Int[Array, ""]
    inner_opt_state: Any
    acc_grads: Any
    skip_state: Any
    task_counts: Int[Array, " tasks"]


class TaskMultiSteps(optax.MultiSteps):
    r"""An :class:`optax.MultiSteps` that accumulates stacked gradients, for chains with ``gaba()``.

    Norms and weights are then those of the mean gradient over the mini-steps. (With
    :func:`gaba_jax.balanced_value_and_grad`, whose gradient is a plain one, ``microbatch_size``
    does the same and ``optax.MultiSteps`` would average gradients that are already balanced.)
    A weighting that needs losses sees those of the mini-step that completes the update.

    With ``task_mask`` the mean of each task is over the mini-steps in which it was present, and the
    tasks present in any of them take part in the update.

    Args:
      opt: the transform to wrap, such as ``optax.chain(gaba(), optax.adamw(1e-3))``.
      every_k_schedule: mini-steps per update, an int or a function of the updates so far.
      num_tasks: number of tasks K, default 2.
      use_grad_mean: the mean over the mini-steps (default), or the sum.
      **options: the other options of ``optax.MultiSteps``.

    Raises:
      ValueError: when ``update`` is traced, on gradients that are not [num_tasks, \*param.shape].

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import TaskMultiSteps, gaba
      >>> tx = TaskMultiSteps(optax.chain(gaba(), optax.sgd(0.1)), every_k_schedule=2)
      >>> params = jnp.zeros(3)
      >>> opt_state = tx.init(params)
      >>> for grads in (jnp.ones((2, 3)), 3 * jnp.ones((2, 3))):
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      >>> updates  # the mean gradient of both tasks is 2
      Array([-0.2, -0.2, -0.2], dtype=float32)
    """

    def __init__(
        self,
        opt: optax.GradientTransformation,
        every_k_schedule: Any,
        num_tasks: int = 2,
        use_grad_mean: bool = True,
        **options: Any,
    ):
        wrapped = optax.with_extra_args_support(opt)

        def update(
            updates: Any, state: Any, params: Any = None, *, mini_steps: Any, **extra_args: Any
        ) -> tuple[Any, Any]:
            """Of the mean over all mini-steps makes that over those a task was present in."""
            counts, so_far = mini_steps
            if use_grad_mean:
                scale = so_far.astype(jnp.float32) / jnp.maximum(counts, 1).astype(jnp.float32)
                updates = jax.tree.map(lambda g: each_task(scale.astype(g.dtype), g) * g, updates)
            return wrapped.update(updates, state, params, **extra_args)

        given: Any = update  # it needs an extra argument, which the methods below pass
        inner = optax.GradientTransformationExtraArgs(wrapped.init, given)
        super().__init__(inner, every_k_schedule, use_grad_mean, **options)
        self._num_tasks = num_tasks

    def init(self, params: Any) -> Any:
        r"""The :class:`TaskMultiStepsState` before any mini-step."""
        state: Any = super().init(params)
        # Of the zeros themselves, which are sharded as the parameters are.
        stacked = jax.tree.map(lambda zeros: jnp.stack([zeros] * self._num_tasks), state.acc_grads)
        counts = jnp.zeros([self._num_tasks], jnp.int32)
        return TaskMultiStepsState(**state._asdict() | {"acc_grads": stacked}, task_counts=counts)

    def update(
        self,
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        task_mask: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        r"""One mini-step: zeros, or the update that it completes.

        Args:
          updates: leaves [K, \*param.shape].
          state: from :meth:`init` or the mini-step before.
          params: the parameters.
          task_mask: [K] bool, the tasks of this mini-step, default all; the gradient of an absent
            one is not read.
          **extra_args: passed on to the wrapped transform.

        Returns:
          (updates of the parameters' shapes, state).
        """
        remedy = (
            "Pass the output of task_value_and_grad, and give TaskMultiSteps(..., num_tasks=K) the "
            "number of its losses."
        )
        num_leaves = len(jax.tree.leaves(state.acc_grads))
        check_stacked(updates, params, self._num_tasks, num_leaves, remedy)
        present = task_presence(task_mask, self._num_tasks)
        counts = state.task_counts + present.astype(jnp.int32)
        if task_mask is not None:
            extra_args["task_mask"] = counts > 0
            updates = jax.tree.map(lambda g: jnp.where(each_task(present, g), g, 0), updates)
        mini_steps = counts, state.mini_step + 1
        new: Any
        updates, new = super().update(updates, state, params, mini_steps=mini_steps, **extra_args)
        # A mini-step that was skipped moves neither.
        skipped = (new.mini_step == state.mini_step) & (new.gradient_step == state.gradient_step)
        counts = jnp.where(new.mini_step == 0, 0, counts)
        counts = jnp.where(skipped, state.task_counts, counts)
        return updates, TaskMultiStepsState(**new._asdict(), task_counts=counts)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """As a transform, which passes ``task_losses`` and ``task_mask`` on."""
        update: Any = self.update  # it takes this state alone, where optax declares any
        return optax.GradientTransformationExtraArgs(self.init, update)
