"""Before training: is balancing worth it for this model and these losses?"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from gaba_jax._checks import check_params, leaf_names
from gaba_jax._findings import Diagnosis
from gaba_jax._selection import Selection, Selector, select
from gaba_jax._state import seen_by_two
from gaba_jax._statistics import Reads, combine_cosines, combine_norms, measure_stacked
from gaba_jax._value_and_grad import task_names as names_of
from gaba_jax._value_and_grad import task_value_and_grad

_READS = Reads(cosines=True)


def diagnose(
    losses_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Sequence[Any]],
    *,
    has_aux: bool = False,
    shared: Selector | None = None,
    measure_on: Selector | None = None,
    task_names: Sequence[str] | None = None,
) -> Diagnosis:
    r"""Measures the task gradients on a few batches before training, and says what to do.

    Print the result: it is a table 80 columns wide that ends in one recommendation and why. It is
    uniform weights if the largest gradient norm is less than 10x the smallest, a convention and no
    result. From there on it is :func:`equalize`. If two tasks conflict for certain, it is
    :func:`gaba_jax.weighting.upgrad`. A conflict is certain if the whole 95 % interval of the
    pair's mean cosine is below -0.1:

    .. math:: \bar c + t_{N-1}\, s / \sqrt{N} < -0.1

    with s the standard deviation of the cosines of N batches and t Student's quantile. With fewer
    than 5 batches it says "not enough batches to tell".

    .. math::
        \text{noise}_i = 1 - \frac{\sum_b \langle a_{ib}, h_{ib} \rangle}
            {\sum_b \left\| \tfrac{1}{2} (a_{ib} + h_{ib}) \right\|^2}

    is the part of task i's squared gradient norm that is minibatch noise, with :math:`a_{ib}` and
    :math:`h_{ib}` its gradients on the two halves of batch b. For losses that are means over a
    batch of B independent examples, :math:`\mathrm{E} \|g_i\|^2 = \|\mu_i\|^2 + \sigma_i^2 / B`
    with :math:`\mu_i` the gradient of the expected loss and :math:`\sigma_i^2` the variance of one
    example's gradient. The noise of the two halves is independent, so their dot product estimates
    :math:`\|\mu_i\|^2` without it.

    Every batch is passed twice per task, whole and in halves, with 3 K gradients in memory.

    Args:
      losses_fn: as for :func:`gaba_jax.task_value_and_grad`.
      params: the parameters before training, on which the gradients are taken.
      batches: the arguments of each batch, in a tuple: ``losses_fn(params, *batch)``. One
        will do for the norms; conflict takes 5 or more. To halve a batch, every array in it is
        split on its leading axis into its even and its odd examples (an odd last one is left out);
        scalars go to both halves, typed random keys folded with the half. Where the leading axes
        differ or are shorter than 2, or ``losses_fn`` takes no half, the noise is not known, NaN.
      has_aux: whether ``losses_fn`` returns ``(losses, aux)``.
      shared: the shared parameters, default found from the gradients of all batches: a leaf is
        shared if two tasks have a nonzero gradient on it. See :func:`gaba_jax.balance`.
      measure_on: where norms, cosines and noise are taken, default all shared parameters.
      task_names: K names, default those of :func:`gaba_jax.task_names`.

    Returns:
      A :class:`Diagnosis`: the measurements of every batch, and what they say.

    Raises:
      ValueError: ``batches`` is empty or holds something else than tuples, there are fewer than two
        losses, their number is not that of the names, a selection holds no parameter, or a gradient
        is not finite on any batch.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gaba_jax import diagnose
      >>> def losses_fn(params, x, y):
      ...     h = jnp.tanh(x @ params["backbone"])
      ...     return {"rul": jnp.mean((h @ params["rul_head"] - y) ** 2),
      ...             "health": jnp.mean((h @ params["health_head"] - 1) ** 2)}
      >>> params = {"backbone": jnp.eye(3), "rul_head": jnp.ones(3), "health_head": jnp.ones(3)}
      >>> x = jax.random.normal(jax.random.key(0), (4, 32, 3))
      >>> found = diagnose(losses_fn, params, [(each, 100 * each[:, 0]) for each in x])
      >>> found.recommendation
      'balance with optax.chain(equalize(2), optax.adamw(1e-3))'
      >>> found.shared  # the backbone; leaves in tree order
      array([ True, False, False])
    """
    check_params(params)
    selection = select(shared, measure_on, params)
    measure = jax.jit(_measurer(losses_fn, has_aux, selection))
    num_leaves = len(selection.measure_on)
    kept: list[tuple[Any, ...]] = []
    names: tuple[str, ...] = ()
    seen: Any = None
    found: list[_Found] = []
    for number, batch in enumerate(batches):
        if not isinstance(batch, tuple | list):
            raise ValueError(
                f"batches must be an iterable of tuples, the arguments of losses_fn after params; "
                f"batch {number} is of type {type(batch).__name__}. Wrap it: [(batch,), ...]."
            )
        if seen is None:
            names = _names(losses_fn, has_aux, params, batch, task_names)
            seen = np.zeros([num_leaves, len(names)], bool)
        kept.append(tuple(batch))
        found.append(jax.device_get(measure(params, kept[-1], seen)))
        seen = found[-1].seen
    if seen is None:
        raise ValueError("batches is empty; give at least one tuple of arguments of losses_fn.")
    # A leaf that showed as shared in a later batch was not measured in those before.
    measured = _on_shared(selection, seen) & np.array(selection.measure_on, bool)
    for number, batch in enumerate(kept):
        if (found[number].measured != measured).any():
            found[number] = jax.device_get(measure(params, batch, seen))
    every = _Found(*(np.stack(column) for column in zip(*found, strict=True)))
    paths = tuple(leaf_names(params))
    finite = np.isfinite(every.norms).all(axis=1)
    if not finite.any():
        broken = np.argwhere(~np.isfinite(every.leaf_norms))
        where = sorted({f"{names[task]!r} on {paths[leaf]!r}" for _, leaf, task in broken})
        raise ValueError(
            f"in each of the {len(found)} batches a gradient is not finite: of {', '.join(where)}. "
            "Look for a log, a division or a square root at 0, or an overflow."
        )
    usable = _Found(*(column[finite] for column in every))
    return Diagnosis(
        task_names=names,
        losses=usable.losses,
        norms=usable.norms,
        cosines=usable.cosines,
        noise=_noise(usable),
        paths=paths,
        shapes=tuple(np.shape(leaf) for leaf in jax.tree.leaves(params)),
        shared=_on_shared(selection, seen),
        measured=measured,
        leaf_norms=np.median(usable.leaf_norms, axis=0),
        nonfinite_count=int(np.sum(~finite)),
    )


class _Found(NamedTuple):
    """What one batch says; ``half_*`` of its halves, NaN where it does not split."""

    losses: Any  # [K]
    norms: Any  # [K], on the measured leaves
    cosines: Any  # [K, K]
    leaf_norms: Any  # [leaves, K]
    seen: Any  # [leaves, K] bool, nonzero gradients up to this batch
    measured: Any  # [leaves] bool
    half_norms: Any  # [2, K]
    half_cosines: Any  # [K], between the halves


def _measurer(
    losses_fn: Callable[..., Any], has_aux: bool, selection: Selection
) -> Callable[[Any, Any, Array], _Found]:
    value_and_grad = task_value_and_grad(losses_fn, has_aux=has_aux)
    all_leaves = (True,) * len(selection.measure_on)

    def stacked(params: Any, batch: Any) -> tuple[Array, list[Array]]:
        losses, grads = value_and_grad(params, *batch)
        return losses[0] if has_aux else losses, jax.tree.leaves(grads)

    def gradients_of_halves(params: Any, batch: Any) -> list[Array]:
        """Leaves [2, K, ...], from one copy of the program."""
        try:
            halves = _halves(batch)
            return halves and lax.map(lambda half: stacked(params, half)[1], halves)
        except Exception:  # it took the whole batch, and what it raises on half of one is its own
            return []

    def measure(params: Any, batch: Any, seen: Array) -> _Found:
        losses, leaves = stacked(params, batch)
        num_tasks = losses.shape[0]
        whole = measure_stacked(leaves, all_leaves, num_tasks, _READS)
        # As the drivers do: a NaN is measured, which rejects the batch, and not remembered.
        pulls = whole.norms != 0
        measured = _on_shared(selection, seen | pulls) & jnp.asarray(selection.measure_on, bool)
        norms = combine_norms(whole.norms, measured)
        half_norms = jnp.full([2, num_tasks], jnp.nan, jnp.float32)
        half_cosines = half_norms[0]
        if both := gradients_of_halves(params, batch):

            def of_task(halves: list[Array]) -> tuple[Array, Array]:
                measurement = measure_stacked(halves, all_leaves, 2, _READS)
                two = combine_norms(measurement.norms, measured)
                return two, combine_cosines(measurement, measured, two)[0, 1]

            half_norms, half_cosines = jax.vmap(of_task, in_axes=1, out_axes=(1, 0))(both)
        return _Found(
            losses=losses,
            norms=norms,
            cosines=combine_cosines(whole, measured, norms),
            leaf_norms=whole.norms,
            seen=seen | (pulls & jnp.isfinite(whole.norms)),
            measured=measured,
            half_norms=half_norms,
            half_cosines=half_cosines,
        )

    return measure


def _on_shared(selection: Selection, seen: Any) -> Any:
    """[leaves] bool: what was named, or what two tasks have had a gradient on."""
    return seen_by_two(seen) if selection.shared is None else np.array(selection.shared, bool)


def _halves(batch: Any) -> list[Any]:
    leaves, structure = jax.tree.flatten(batch)
    sizes = {leaf.shape[0] for leaf in leaves if leaf.ndim > 0}
    if len(sizes) != 1 or (size := sizes.pop()) < 2:
        return []

    def parts(leaf: Array) -> Array:
        if leaf.ndim > 0:
            half = size // 2
            return jnp.swapaxes(leaf[: 2 * half].reshape(half, 2, *leaf.shape[1:]), 0, 1)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        each = [jax.random.fold_in(leaf, half) if is_key else leaf for half in (0, 1)]
        return jnp.stack(each)

    return structure.unflatten(map(parts, leaves))


def _noise(found: _Found) -> np.ndarray:
    """[K], from the batches that could be split."""
    first, second = np.moveaxis(np.asarray(found.half_norms, np.float64), 1, 0)  # each [N, K]
    dots = first * second * found.half_cosines
    squares = (first**2 + second**2 + 2 * dots) / 4
    known = np.isfinite(squares)
    signal, total = (np.where(known, values, 0).sum(axis=0) for values in (dots, squares))
    # Halves that cancel are all noise; without a gradient there is nothing to say.
    otherwise = np.where(signal < 0, np.inf, np.nan)
    return np.where(total > 0, 1 - signal / np.where(total > 0, total, 1), otherwise)


def _names(
    losses_fn: Callable[..., Any],
    has_aux: bool,
    params: Any,
    batch: Sequence[Any],
    task_names: Sequence[str] | None,
) -> tuple[str, ...]:
    value_and_grad = task_value_and_grad(losses_fn, has_aux=has_aux)

    def losses(function: Callable[..., Any], part: bool) -> Any:
        def alone(*args: Any) -> Any:
            out = function(*args)
            return out[0] if part else out

        return jax.eval_shape(alone, params, *batch)

    losses(lambda *args: value_and_grad(*args)[0], has_aux)  # raises on what are no losses
    found = names_of(losses(losses_fn, has_aux))
    names = found if task_names is None else tuple(task_names)
    if len(found) < 2:
        raise ValueError(
            "losses_fn returned one loss; diagnose compares the gradients of two tasks or more."
        )
    if len(names) != len(found) or len(set(names)) != len(found):
        raise ValueError(
            f"task_names must be {len(found)} different names, one per loss; got {list(names)}."
        )
    return names
