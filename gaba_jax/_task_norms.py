"""Gradient norms of the tasks, from stacked gradients."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gaba_jax._checks import check_stacked
from gaba_jax._selection import Selector, select
from gaba_jax._state import seen_by_two
from gaba_jax._statistics import combine_norms, measure_stacked

_REMEDY = "Pass the gradients that task_value_and_grad returns."


def task_norms(grads: Any, *, shared: Selector | None = None) -> Float[Array, " tasks"]:
    r"""The gradient norm of each task on the shared parameters.

    .. math:: g_i = \left\| \nabla_{\theta_{\text{shared}}} L_i \right\|_2

    These are the ``task_norms`` that :func:`balance` has in its state after a first update. They
    are safe from 1e-30 to 1e30, in any floating-point dtype, and may be traced.

    Use it to look at gradients, or in a weighting of your own outside this library. A rule in
    :func:`balance` has its norms already, and a run that is balanced logs them by
    :func:`balance_metrics`. Over several batches, with cosines: :func:`diagnose`.

    Args:
      grads: leaves [K, \*param.shape], as :func:`task_value_and_grad` returns them.
      shared: the parameters on which norms are taken, as ``only("backbone")`` or
        ``exclude("*_head")``; True takes all. Default: found from these gradients, a leaf is shared
        if two tasks have a nonzero gradient on it. See :func:`balance`.

    Returns:
      [K] float32; 0 where no parameter is shared. A task whose gradient is not finite has a norm
      that is not.

    Raises:
      ValueError: no gradients, leaves without the tasks as leading axis or not floating-point, or a
        selection that holds no parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax import task_norms, task_value_and_grad
      >>> def losses_fn(params, x):
      ...     h = x @ params["backbone"]
      ...     return h @ params["a"], 500 * h @ params["b"]
      >>> params = {"backbone": jnp.eye(2), "a": jnp.array([1.0, 0.0]), "b": jnp.array([0.0, 1.0])}
      >>> _, grads = task_value_and_grad(losses_fn)(params, jnp.array([3.0, 4.0]))
      >>> task_norms(grads)  # on the backbone
      Array([   5., 2500.], dtype=float32)
    """
    leaves = jax.tree.leaves(grads)
    if not leaves:
        raise ValueError(f"grads has no leaves. {_REMEDY}")
    shape = jnp.shape(leaves[0])
    num_tasks = shape[0] if shape else 1  # without an axis the check says so
    check_stacked(grads, None, num_tasks, len(leaves), _REMEDY, what="grads")
    of_one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), grads)
    selection = select(shared, None, of_one)
    norms = measure_stacked(leaves, selection.wanted(), num_tasks).norms
    measured = jnp.asarray(selection.wanted())
    if shared is None and num_tasks > 1:
        measured &= seen_by_two(norms != 0)  # a NaN counts as a gradient
    return combine_norms(norms, measured)
