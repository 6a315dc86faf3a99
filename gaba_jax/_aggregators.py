"""Aggregators that work coordinate by coordinate, which no weights per task can do."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from gaba_jax._checks import check_stacked, each_task, leaf_names
from gaba_jax._selection import is_overwritten
from gaba_jax._state import task_presence
from gaba_jax._statistics import weighted, whole_leaves, wide
from gaba_jax.weighting._base import check_num_tasks
from gaba_jax.weighting._random import RandomState, initial_key, next_key


def grad_drop(num_tasks: int, *, seed: int | Array = 0) -> optax.GradientTransformationExtraArgs:
    r"""GradDrop (Chen et al., "Just pick a sign", NeurIPS 2020), on stacked gradients.

    In each coordinate the tasks whose gradients have one sign are kept and those of the other sign
    are dropped. Which sign is drawn, in proportion to how much it has:

    .. math:: P = \frac12 \left(1 + \frac{\sum_i g_i}{\sum_i |g_i|}\right), \qquad
        u = \begin{cases} \sum_i \max(g_i, 0) & U < P \\
        \sum_i \min(g_i, 0) & \text{else} \end{cases}, \qquad U \sim \mathcal U(0, 1)

    all of it coordinate by coordinate, with a U for each. Where no gradients differ in sign, as in
    a head, which one task alone moves, the update is their sum. It is the paper's rule with the
    identity as its function f and a leak of 0, applied to the gradients of the parameters (the
    paper applies it to those of activations).

    When not to use it: norms are not evened out, so the loud task decides most signs; balance
    first, with ``per_task(optax.normalize_by_update_norm(), K)``. The update is a sum of tasks and
    a random one: its scale is K times that of a mean, and it needs a smaller learning rate.

    Args:
      num_tasks: number of tasks K.
      seed: of the draws, from 0 to 2^32 - 1, default 0.

    Returns:
      A transform that turns leaves [K, \*param.shape] into leaves [\*param.shape] of the same
      dtype. First in the chain. Its state is a :class:`gaba_jax.weighting.RandomState`. Its
      ``update`` takes ``task_mask`` [K] bool, the tasks that are in this batch: the gradient of an
      absent task is never read. Other extra arguments are ignored. A NaN stays in the update.

    Raises:
      ValueError: ``seed`` is no whole number from 0 to 2^32 - 1, at construction; on a leaf whose
        leading axis is not the tasks, or that is complex, when ``update`` is traced.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import grad_drop
      >>> tx = optax.chain(grad_drop(2), optax.sgd(1.0))
      >>> grads = jnp.array([[1.0, 3.0, 0.0], [2.0, -1.0, 0.0]])
      >>> updates, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> print(updates[0], updates[1] in (-3, 1))  # one sign or the other
      -3.0 True
    """
    check_num_tasks(num_tasks)
    key = initial_key(seed)

    def init_fn(params: Any) -> RandomState:
        del params
        return RandomState(key())

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        task_mask: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del extra_args
        key_data, draw = next_key(state.key_data)

        def one_sign(number: int, each: Array, present: Array) -> Array:
            each = jnp.where(each_task(present, each), each, 0)
            above = jnp.sum(jnp.maximum(each, 0), axis=0)
            below = jnp.sum(jnp.minimum(each, 0), axis=0)
            total = above - below
            purity = above / jnp.where(total > 0, total, 1)
            uniform = jax.random.uniform(jax.random.fold_in(draw, number), above.shape, jnp.float32)
            return jnp.where(uniform < purity, above, below)

        return _aggregated(updates, params, num_tasks, task_mask, one_sign), RandomState(key_data)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def trimmed_mean(num_tasks: int, trim: int) -> optax.GradientTransformationExtraArgs:
    r"""The mean without the largest and the smallest values (Yin et al., ICML 2018).

    .. math:: u = \frac{1}{K - 2t} \sum_{k = t + 1}^{K - t} g_{(k)}

    coordinate by coordinate, where :math:`g_{(1)} \le \dots \le g_{(K)}` are the values of the K
    gradients there and t is ``trim``. So t gradients that are anything at all, such as those of an
    adversary or of a broken worker, do not move the update out of the range of the others. A NaN
    counts as the largest value, and is trimmed as such.

    When not to use it: to balance tasks that differ on purpose. In a head, which one task alone
    moves, the others' zeros outvote it; give heads to another transform:
    ``optax.partition({"shared": trimmed_mean(K, 1), "head": balance(weighting.uniform(K))}, ...)``.

    Args:
      num_tasks: number of gradients K.
      trim: t, how many values are dropped on each side, from 0 (the mean) to less than K / 2.

    Returns:
      A transform that turns leaves [K, \*param.shape] into leaves [\*param.shape] of the same
      dtype, without a state. First in the chain. Its ``update`` takes ``task_mask`` [K] bool, the
      gradients that are in this batch: the others are never read. Of n present ones, where those
      are fewer than 2 t + 1, the middle one is left, or the mean of the middle two. Other extra
      arguments are ignored.

    Raises:
      ValueError: ``trim`` is no such integer, at construction; on a leaf whose leading axis is not
        the tasks, or that is complex, when ``update`` is traced.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import trimmed_mean
      >>> tx = optax.chain(trimmed_mean(4, 1), optax.sgd(1.0))
      >>> grads = jnp.array([[1.0, 2.0], [1.5, 2.5], [-900.0, 0.0], [1.2, 1e9]])
      >>> updates, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(updates)
      [-1.1  -2.25]
    """
    check_num_tasks(num_tasks)
    if not isinstance(trim, int | np.integer) or isinstance(trim, bool):
        raise ValueError(f"{trim=} must be an integer.")
    if not 0 <= 2 * trim < num_tasks:
        raise ValueError(
            f"{trim=} must be at least 0 and leave one of the num_tasks={num_tasks} values: "
            f"at most {(num_tasks - 1) // 2}."
        )

    def init_fn(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        task_mask: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del extra_args

        def middle(number: int, each: Array, present: Array) -> Array:
            del number
            ordered = jnp.sort(jnp.where(each_task(present, each), each, jnp.nan), axis=0)
            count = jnp.sum(present)
            dropped = jnp.minimum(trim, jnp.maximum(count - 1, 0) // 2)
            place = jnp.arange(num_tasks)
            left = each_task((place >= dropped) & (place < count - dropped), each)
            total = jnp.sum(jnp.where(left, ordered, 0), axis=0)
            return total / jnp.maximum(count - 2 * dropped, 1).astype(total.dtype)

        return _aggregated(updates, params, num_tasks, task_mask, middle), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _aggregated(
    updates: Any,
    params: Any,
    num_tasks: int,
    task_mask: ArrayLike | None,
    combine: Callable[[int, Array, Bool[Array, " tasks"]], Array],
) -> Any:
    """``combine(number of the leaf, its gradients in float32 at least, [K] present)`` of each."""
    leaves, structure = jax.tree.flatten(updates)
    check_stacked(updates, params, num_tasks, len(leaves))
    present, names = task_presence(task_mask, num_tasks), leaf_names(updates)

    def combined(number: int, name: str, leaf: Array) -> Array:
        if jnp.iscomplexobj(leaf):
            raise ValueError(
                f"updates leaf {name!r} is complex, and complex numbers have no order. Split it "
                "into real and imaginary parts with optax.contrib.split_real_and_imaginary, or "
                "take balance(...)."
            )
        if is_overwritten(name):
            return weighted(whole_leaves([leaf])[0], None, present)
        return combine(number, leaf.astype(wide(leaf)), present).astype(leaf.dtype)

    each = [combined(i, *of) for i, of in enumerate(zip(names, leaves, strict=True))]
    return structure.unflatten(each)
