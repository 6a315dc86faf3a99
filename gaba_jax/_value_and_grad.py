"""Losses and stacked gradients of several tasks from one forward pass."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from gaba_jax._checks import check_params, is_stacked, path_name
from gaba_jax._passes import whole
from gaba_jax._slices import Sliced, slices_of

Method = Literal["unroll", "vmap", "scan"]


def task_value_and_grad(
    losses_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    method: Method = "unroll",
    in_axes: Any = None,
) -> Callable[..., tuple[Any, Any]]:
    r"""Evaluates K losses and the gradient of each, as :func:`jax.value_and_grad` does for one.

    One forward pass; its residuals serve K backward passes.

    Args:
      losses_fn: ``losses_fn(params, *args, **kwargs)`` returns the K task losses: a [K] array, or
        a tuple, list or dict of K scalars (a dict in pytree order, its keys sorted).
      has_aux: whether ``losses_fn`` returns ``(losses, aux)``.
      method: how the K backward passes run. "unroll" (default): one after the other in the
        program, fastest; "vmap": batched, the most memory; "scan": in a loop, for a program whose
        size does not grow with K. The numbers are the same, unless a ``jax.custom_vjp`` in the
        model returns more than 0 for a cotangent of 0: then "unroll" gives each loss's own gradient
        and the others what the losses together give.
      in_axes: where every task has examples of its own, the axes of the arguments after ``params``
        that hold the tasks, as in :func:`jax.vmap`: an integer for all arguments, or one entry for
        each, None for an argument that every task gets whole. ``losses_fn(params, *slice)`` then
        returns ONE scalar loss, that of the slice it is given: a task's batch, or one example.
        Slice i is task i. This is ``jax.vmap(jax.value_and_grad(losses_fn), (None, *in_axes))``;
        with ``method="scan"`` one slice is run after the other. ``aux`` has the slices as its
        leading axis. Keyword arguments are not mapped. Default None: one batch has all K losses.

    Returns:
      A function of the same arguments that returns ``(losses, grads)``: losses [K], and grads with
      the structure of ``params`` and leaves [K, \*param.shape]. With ``has_aux``,
      ``((losses, aux), grads)``.

      Inside ``jax.shard_map`` average each loss in ``losses_fn``, with ``jax.lax.pmean``: without
      that the gradients are sums over the devices.

      A NaN in one task does not reach the gradients of the others under "unroll", where losses
      are returned separately (tuple, list, dict): each is transposed by itself. A stacked [K] array
      cannot be told apart, and "vmap" and "scan" send zeros through every task: zero times
      NaN is NaN.

    Raises:
      ValueError: an unknown method; losses that are no real scalars; ``in_axes`` that do not fit
        the arguments.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gaba_jax import task_value_and_grad
      >>> def losses_fn(w, x):
      ...     y = x @ w
      ...     return {"mean": y.mean(), "energy": (y**2).sum()}
      >>> losses, grads = task_value_and_grad(losses_fn)(jnp.ones(2), jnp.eye(2))
      >>> losses, grads  # sorted keys: "energy" first
      (Array([2., 1.], dtype=float32), Array([[2. , 2. ],
             [0.5, 0.5]], dtype=float32))

      Every row of a batch a task:

      >>> def loss_fn(w, x):
      ...     return (x @ w) ** 2
      >>> task_value_and_grad(loss_fn, in_axes=0)(jnp.ones(2), jnp.eye(2))
      (Array([1., 1.], dtype=float32), Array([[2., 0.],
             [0., 2.]], dtype=float32))
    """
    if method not in ("unroll", "vmap", "scan"):
        raise ValueError(f'{method=} must be "unroll", "vmap" or "scan".')

    def value_and_grad(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        check_params(params)
        if in_axes is not None:
            sliced = Sliced(losses_fn, None, has_aux, slices_of(in_axes, args), args, kwargs)
            losses, aux, grads = sliced.stacked(params, one_by_one=method == "scan")
            return ((losses, aux) if has_aux else losses), grads
        linear = whole(lambda p: losses_fn(p, *args, **kwargs), params, has_aux)
        num_tasks = linear.losses.shape[0]
        if method == "unroll":
            each = linear.each_gradient()
            grads = jax.tree.unflatten(jax.tree.structure(params), each)
        else:
            one_hot = jnp.eye(num_tasks, dtype=linear.losses.dtype)
            if method == "vmap":
                grads = jax.vmap(linear.pull_back)(one_hot)
            else:
                grads = lax.map(linear.pull_back, one_hot)
        return ((linear.losses, linear.aux) if has_aux else linear.losses), grads

    return value_and_grad


def task_names(losses: Any) -> tuple[str, ...]:
    """Names of the K losses, in the order of the task axis.

    Args:
      losses: what ``losses_fn`` returned: a dict (its keys, sorted), or a tuple, list or [K] array
        (their positions).

    Returns:
      K names.

    Example:
      >>> from gaba_jax import task_names
      >>> task_names({"rul": 1.0, "health": 2.0})
      ('health', 'rul')
    """
    if is_stacked(losses):
        return tuple(map(str, range(losses.shape[0])))
    return tuple(path_name(path) for path, _ in jax.tree.leaves_with_path(losses))
