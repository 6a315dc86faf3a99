"""Any optax transform on the gradient of each task by itself."""

from typing import Any

import jax
import optax

from gaba_jax._checks import check_stacked
from gaba_jax.weighting._base import check_num_tasks


def per_task(
    tx: optax.GradientTransformation, num_tasks: int = 2
) -> optax.GradientTransformationExtraArgs:
    r"""Applies a transform to each task's gradient, before balancing. Ahead of ``gaba()``.

    For task i's gradient :math:`\nabla L_i` and its own state :math:`s_i`

    .. math:: (u_i, s_i) \leftarrow \mathrm{tx}(\nabla L_i, s_i, \text{params})

    so ``optax.clip_by_global_norm`` clips each task's gradient by its own norm, ``optax.ema``
    averages each one by itself, ``optax.scale_by_adam`` keeps moments per task: K times the state.
    What follows in the chain measures and balances the results.

    When not to use it: for a transform of the balanced update, which goes after ``gaba()``. One
    that makes every task's norm alike leaves nothing to balance. One that turns zeros into
    something else (``add_decayed_weights``, ``add_noise``) makes every leaf look shared: then name
    ``shared`` in :func:`gaba`. A transform that draws random numbers draws the same for each task.
    There are no gradients per task in :func:`balanced_value_and_grad`.

    The tasks are kept apart, by ``jax.vmap``: a NaN in one of them reaches no other, and stays in
    that task's own state where ``tx`` keeps averages (``optax.apply_if_finite`` within ``per_task``
    prevents that). A ``task_mask`` is for what follows: the gradient of an absent task goes through
    ``tx`` too, and moves that task's averages.

    Args:
      tx: any optax transform that keeps shapes, or a chain of them.
      num_tasks: number of tasks K, default 2.

    Returns:
      A transform from leaves [K, \*param.shape] to the same. Its state is that of ``tx``, each leaf
      with a leading axis of K tasks; ``params`` are the parameters, without it. Extra arguments
      (``task_losses``, ``task_mask`` and others) are accepted and not passed to ``tx``.
      ``optax.tree_map_params`` knows the parameters in the state; the function is given them with
      the tasks' axis, so a ``PartitionSpec`` needs a None in front.

    Raises:
      ValueError: ``tx`` is no optax transform, or ``num_tasks`` no integer >= 1, at construction;
        a leaf whose leading axis is not the tasks, when ``update`` is traced.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import gaba, per_task
      >>> tx = optax.chain(
      ...     per_task(optax.clip_by_global_norm(1.0)), gaba(warmup_steps=0), optax.sgd(0.1))
      >>> params = {"shared": jnp.zeros(2)}
      >>> grads = {"shared": jnp.array([[300.0, 400.0], [0.0, 0.5]])}
      >>> updates, opt_state = tx.update(grads, tx.init(params), params)
      >>> print(optax.tree.get(opt_state, "task_norms"))  # of the clipped gradients
      [1.  0.5]
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(
            f"tx must be an optax transform, such as optax.clip_by_global_norm(1.0); got {tx!r}."
        )
    check_num_tasks(num_tasks)

    def init_fn(params: Any) -> Any:
        return jax.vmap(tx.init, in_axes=None, axis_size=num_tasks)(params)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        check_stacked(updates, params, num_tasks, len(jax.tree.leaves(updates)))
        return jax.vmap(tx.update, in_axes=(0, 0, None), axis_size=num_tasks)(
            updates, state, params
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
