"""Gradient accumulation around a balancing transform."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


class TaskMultiSteps(optax.MultiSteps):
    r"""An :class:`optax.MultiSteps` that accumulates stacked gradients, for chains with ``gaba()``.

    Norms and weights are then those of the mean gradient over the mini-steps. (With
    :func:`gaba_jax.balanced_value_and_grad`, whose gradient is a plain one, ``microbatch_size``
    does the same and ``optax.MultiSteps`` would average gradients that are already balanced.)
    A weighting that needs losses sees those of the mini-step that completes the update.

    Args:
      opt: the transform to wrap, such as ``optax.chain(gaba(), optax.adamw(1e-3))``.
      every_k_schedule: mini-steps per update, an int or a function of the updates so far.
      num_tasks: number of tasks K, default 2.
      **options: the other options of ``optax.MultiSteps``.

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
        **options: Any,
    ):
        super().__init__(opt, every_k_schedule, **options)
        self._num_tasks = num_tasks

    def init(self, params: Any) -> optax.MultiStepsState:
        r"""The state before any mini-step; its accumulators are [K, \*param.shape]."""
        state = super().init(params)
        stacked = jax.tree.map(
            lambda zeros: jnp.zeros((self._num_tasks, *zeros.shape), zeros.dtype), state.acc_grads
        )
        return state._replace(acc_grads=stacked)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """As a transform, which passes ``task_losses`` and ``task_mask`` on."""
        update: Any = self.update  # its state is a subtype of what optax declares
        return optax.GradientTransformationExtraArgs(self.init, update)
