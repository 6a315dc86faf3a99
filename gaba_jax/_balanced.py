"""Losses and one balanced gradient, in the memory of one gradient."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gaba_jax import _stats
from gaba_jax._advance import (
    BalanceState,
    Measurement,
    advance,
    check_state,
    hold,
    init_state,
    is_due,
    measures_gradients,
    needed_losses,
    restrict,
    task_presence,
)
from gaba_jax._selection import Selection, Selector, select
from gaba_jax._transform import (
    Nonfinite,
    check_driver_arguments,
    leaf_coefficients,
    measure_stacked,
    wanted_leaves,
)
from gaba_jax._value_and_grad import check_inexact, check_params, linearize_losses
from gaba_jax.weighting._base import Weighting, check_weighting

Measure = Literal["exact", "lagged"]
Norms = Literal["direct", "ghost"]


class BalancedGradient(NamedTuple):
    """What :func:`balanced_value_and_grad` returns.

    Attributes:
      init: ``params -> BalanceState``.
      value_and_grad: ``(params, state, *args, task_mask=None) -> ((losses, grads), state)``;
        with ``has_aux``, ``(((losses, aux), grads), state)``.
    """

    init: Callable[[Any], BalanceState]
    value_and_grad: Callable[..., tuple[tuple[Any, Any], BalanceState]]


def balanced_value_and_grad(
    losses_fn: Callable[..., Any],
    weighting: Weighting,
    *,
    measure: Measure = "exact",
    encoder: Callable[..., Any] | None = None,
    every: int = 1,
    microbatch_size: int | None = None,
    norms: Norms = "direct",
    has_aux: bool = False,
    shared: Selector | None = None,
    measure_on: Selector | None = None,
    weight_task_specific: bool = True,
    nonfinite: Nonfinite = "propagate",
) -> BalancedGradient:
    r"""Evaluates K losses and their one balanced gradient, from one forward pass.

    .. math:: u = \sum_i \lambda_i \nabla L_i

    The same weights, state and gradient as :func:`gaba_jax.balance` on stacked gradients, without
    the stack: a rule that reads only norms needs no more memory than a step with fixed weights.

    Args:
      losses_fn: as for :func:`gaba_jax.task_value_and_grad`, returning K losses; with ``encoder``,
        ``losses_fn(params, features, *args)``.
      weighting: a rule from :mod:`gaba_jax.weighting`.
      measure: "exact" (default): one backward pass per task to its norm alone, then one with the
        weights, K + 1 in all. "lagged": K backward passes, summed with the weights of the update
        before (the rule's initial weights at first) while they are measured for the next.
        A rule that needs cosines stacks K gradients to measure them either way, and then takes one
        backward pass with the weights, which was faster than summing the stack; a rule that reads
        no gradients takes that one pass alone.
      encoder: ``encoder(params, *args) -> features``, a pytree. Norms are then those of the
        gradients with respect to the features, and the encoder is passed backward once: the cost
        of a plain step. A proxy: it sees how hard each task pulls on the features, not what the
        encoder's Jacobian makes of it. On the turbofan model the contributions that its weights
        leave are within 2x of each other in the median (``benchmarks.encoder``). ``shared`` and
        ``measure_on`` do not matter to it.
      every: measure at the first and then every n-th update, default 1; in between the weights
        are held, at the cost of a plain step. Averages keep their time constant in updates.
      microbatch_size: run the batch in parts of this size, with the activations of one part in
        memory; the losses must be means over the batch. Norms are those of the mean gradient. All
        arrays in ``args`` have the batch as leading axis (it is split with a stride, which leaves
        a batch that is sharded over devices where it is); scalars go to every part, typed random
        keys folded with its number. ``aux`` has the parts as its leading axis. Each part runs
        forward again for every backward pass, and is reduced by itself across devices. Default
        None, the batch as a whole.
      norms: "direct" (default), or "ghost": the norm of a matrix gradient from its two factors,
        activations and cotangents, where that is cheaper, for ``measure="exact"``. Relative error
        about 1e-9 times the square of how much the examples' gradients cancel each other.
      has_aux: whether ``losses_fn`` returns ``(losses, aux)``.
      shared: the shared parameters, default found from the gradients; see :func:`balance`.
      measure_on: where norms are taken, default all shared parameters; see :func:`balance`.
      weight_task_specific: see :func:`balance`.
      nonfinite: "propagate" (default), or "drop" with ``measure="lagged"``; see :func:`balance`.

    Returns:
      A :class:`BalancedGradient`. ``value_and_grad(params, state, *args, task_mask=None)`` gives
      losses [K], the gradient with the shapes and dtypes of ``params``, for any optax optimizer,
      and the next :class:`BalanceState`. ``task_mask`` [K] bool marks the tasks that are in this
      batch. The losses of an absent task must be finite, with finite derivatives: its zero weight
      meets them in one backward pass, and zero times NaN is NaN. Not so under "lagged" (without
      cosines), where losses that are returned separately (tuple, list, dict) are kept apart.

    Raises:
      ValueError: a wrong argument, or two that exclude each other, at construction; on a selection
        that holds no parameter, at ``init``; on a wrong number of losses, or a batch that does not
        split, when traced.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gaba_jax import balanced_value_and_grad, weighting
      >>> def losses_fn(params, x):
      ...     h = jnp.tanh(x @ params["backbone"])
      ...     return 500.0 * jnp.mean(h @ params["a"]), jnp.mean((h @ params["b"]) ** 2)
      >>> params = {"backbone": jnp.ones((3, 2)), "a": jnp.ones(2), "b": jnp.ones(2)}
      >>> balanced = balanced_value_and_grad(losses_fn, weighting.inverse_norm(2))
      >>> tx = optax.adamw(1e-3)
      >>> state, opt_state = balanced.init(params), tx.init(params)
      >>> @jax.jit
      ... def train_step(params, state, opt_state, x):
      ...     (losses, grads), state = balanced.value_and_grad(params, state, x)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     return optax.apply_updates(params, updates), state, opt_state, losses
      >>> params, state, opt_state, losses = train_step(params, state, opt_state, jnp.ones((4, 3)))
      >>> contributions = state.task_weights * state.task_norms  # equal, 500x apart before
      >>> bool(jnp.allclose(contributions[0], contributions[1]))
      True
    """
    check_weighting(weighting)
    check_driver_arguments(shared, weight_task_specific, nonfinite)
    _check_arguments(weighting, measure, encoder, every, microbatch_size, norms, nonfinite)
    num_tasks, drop = weighting.num_tasks, nonfinite == "drop"
    reads = measures_gradients(weighting)
    forward = functools.partial(_forward, losses_fn, encoder, has_aux)

    def init(params: Any) -> BalanceState:
        select(shared, measure_on, params)
        return init_state(weighting, len(jax.tree.leaves(params)))

    def value_and_grad(
        params: Any, state: BalanceState, *args: Any, task_mask: ArrayLike | None = None
    ) -> tuple[tuple[Any, Any], BalanceState]:
        check_params(params)
        check_state(state, len(jax.tree.leaves(params)), num_tasks)
        selection = select(shared, measure_on, params)
        wanted = wanted_leaves(selection, "propagate")
        # Without leaves there is no sum to run over the tasks.
        one_by_one = bool(wanted) and "cosines" not in weighting.needs
        present = task_presence(task_mask, num_tasks)
        if microbatch_size is None:
            run = forward(params, *args)
        else:
            run = _in_microbatches(forward, params, args, microbatch_size)
        if run.losses.shape[0] != num_tasks:
            raise ValueError(
                f"losses_fn returned {run.losses.shape[0]} losses, but the weighting has "
                f"num_tasks={num_tasks}: give the weighting the number of losses."
            )
        # Where jax does not tell by this name, the backward pass fails with an error of its own.
        manual = getattr(jax.typeof(run.losses), "manual_axis_type", None)
        if axes := getattr(manual, "varying", ()):
            raise ValueError(
                f"the losses differ along {sorted(axes)}, mesh axes of jax.shard_map: norms must "
                "be those of the mean gradient. Average each loss in losses_fn, with "
                f"jax.lax.pmean(loss, {tuple(sorted(axes))}); for a model on each device pass "
                "check_vma=False to shard_map."
            )
        # Transposing each loss by itself makes the program K times larger: only where it matters.
        apart = task_mask is not None or drop

        def measured(
            measurement: Measurement | None, on: Selection = selection, usable: Array = present
        ) -> BalanceState:
            return advance(
                weighting,
                on,
                state,
                measurement if reads else None,
                task_losses=needed_losses(weighting, run.losses),
                present=present,
                usable=usable,
                lagged=measure == "lagged",
            )

        def weighted(state: BalanceState) -> Any:
            """The gradient with the state's weights, from one backward pass."""
            grads = run.pull_back(state.task_weights)
            if weight_task_specific or selection.shared is None:
                return grads
            plain = run.pull_back(present.astype(jnp.float32))
            mask = jax.tree.unflatten(jax.tree.structure(params), selection.shared)
            return jax.tree.map(lambda s, g, p: g if s else p, mask, grads, plain)

        def from_norms() -> BalanceState:
            if not reads:
                return measured(None)
            if encoder is not None:
                features = run.feature_gradients()
                all_of_them = (True,) * len(features)
                measurement = measure_stacked(features, all_of_them, num_tasks)
                return measured(measurement, Selection(all_of_them, all_of_them))
            if not one_by_one:
                stacked = _stack([run.pull_back_one(i) for i in range(num_tasks)])
                return measured(measure_stacked(stacked, wanted, num_tasks))
            return measured(Measurement(_norms(run, num_tasks, wanted, norms), _no_cosines))

        def while_summing() -> tuple[BalanceState, Any]:
            def factors(usable: Array) -> list[Array]:
                task_weights = restrict(weighting, state.next_task_weights, usable)
                return leaf_coefficients(task_weights, usable, selection, weight_task_specific)

            leaf_norms, usable, grads = _sum_and_norms(
                run, params, present, factors, wanted=wanted, apart=apart, drop=drop
            )
            return measured(Measurement(leaf_norms, _no_cosines), usable=usable), grads

        def if_due(measure: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
            if every == 1:
                return measure()
            return lax.cond(is_due(state, every), measure, otherwise)

        def held() -> BalanceState:
            return hold(weighting, state, present)

        if measure == "lagged" and encoder is None and one_by_one and (reads or drop):
            new, grads = if_due(while_summing, lambda: (held(), weighted(held())))
        else:
            new = if_due(from_norms, held)
            grads = weighted(new)
        return ((run.losses, run.aux) if has_aux else run.losses, grads), new

    return BalancedGradient(init, value_and_grad)


class _Run(NamedTuple):
    """A forward pass; ``pull_back`` and ``pull_back_one`` as in LinearizedLosses."""

    losses: Array
    aux: Any
    pull_back: Callable[[Array], Any]
    pull_back_one: Callable[[int], Any]
    feature_gradients: Callable[[], list[Array]]  # leaves [K, ...]; with an encoder


def _forward(
    losses_fn: Callable[..., Any],
    encoder: Callable[..., Any] | None,
    has_aux: bool,
    params: Any,
    *args: Any,
) -> _Run:
    if encoder is None:
        linear = linearize_losses(lambda p: losses_fn(p, *args), params, has_aux)
        return _Run(*linear, feature_gradients=lambda: [])

    features, pull_features = jax.vjp(lambda p: encoder(p, *args), params)
    if not jax.tree.leaves(features):
        raise ValueError("encoder returned no features; it must return the pytree that heads read.")
    check_inexact(
        features, "the encoder's features", "Compute it in losses_fn, from its arguments."
    )
    linear = linearize_losses(lambda both: losses_fn(*both, *args), (params, features), has_aux)

    def through_encoder(grads: tuple[Any, Any]) -> Any:
        return jax.tree.map(jnp.add, grads[0], pull_features(grads[1])[0])

    def feature_gradients() -> list[Array]:
        return _stack([linear.pull_back_one(i)[1] for i in range(linear.losses.shape[0])])

    return _Run(
        linear.losses,
        linear.aux,
        lambda cotangent: through_encoder(linear.pull_back(cotangent)),
        lambda index: through_encoder(linear.pull_back_one(index)),
        feature_gradients,
    )


def _stack(grads: list[Any]) -> list[Array]:
    """Leaves [K, ...] of the gradients of K tasks."""
    return [jnp.stack(leaf) for leaf in zip(*map(jax.tree.leaves, grads), strict=True)]


def _in_microbatches(forward: Callable[..., _Run], params: Any, args: Any, size: int) -> _Run:
    """The run of the mean loss over the parts of a batch; every part is run anew for each use."""
    leaves, structure = jax.tree.flatten(args)
    lengths = {jnp.shape(leaf)[0] for leaf in leaves if jnp.ndim(leaf) > 0}
    if len(lengths) != 1 or (batch := lengths.pop()) % size:
        raise ValueError(
            f"microbatch_size={size} must divide the leading axis of every array in the arguments; "
            f"their shapes are {[jnp.shape(leaf) for leaf in leaves]}. Let losses_fn close over "
            "what is no part of the batch; pass random keys as jax.random.key(...)."
        )
    num_parts = batch // size

    def is_key(leaf: Any) -> bool:
        return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)

    # Part m is every num_parts-th example: each device of a sharded batch has its share of a part.
    parts = (
        jnp.arange(num_parts),
        [
            jnp.moveaxis(jnp.reshape(leaf, (size, num_parts, *leaf.shape[1:])), 1, 0)
            for leaf in leaves
            if jnp.ndim(leaf) > 0
        ],
    )

    def run(part: tuple[Array, list[Array]]) -> _Run:
        number, arrays = part
        sliced = iter(arrays)
        filled = [
            next(sliced)
            if jnp.ndim(leaf) > 0
            else jax.random.fold_in(leaf, number)
            if is_key(leaf)
            else leaf
            for leaf in leaves
        ]
        return forward(params, *jax.tree.unflatten(structure, filled))

    def mean(pull: Callable[[_Run], Any]) -> Any:
        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, pull(run(part))), None

        total, _ = lax.scan(add, _zeros_to_sum(params), parts)
        return jax.tree.map(lambda t, p: (t / num_parts).astype(p.dtype), total, params)

    def feature_gradients() -> list[Array]:
        each = lax.map(lambda part: run(part).feature_gradients(), parts)
        return [jnp.moveaxis(leaf, 0, 1) / num_parts for leaf in each]

    losses, aux = lax.map(lambda part: (run(part).losses, run(part).aux), parts)
    return _Run(
        jnp.mean(losses, axis=0),
        aux,
        lambda cotangent: mean(lambda part: part.pull_back(cotangent)),
        lambda index: mean(lambda part: part.pull_back_one(index)),
        feature_gradients,
    )


def _zeros_to_sum(params: Any) -> Any:
    # Alike in sharding too, which on a mesh of Explicit axes is part of the type.
    return jax.tree.map(lambda p: jnp.zeros_like(p, _stats.wide(p)), params)


def _norms(
    run: _Run, num_tasks: int, wanted: tuple[bool, ...], norms: Norms
) -> Float[Array, "leaves tasks"]:
    """Norms per leaf and task, from one backward pass per task that keeps nothing else."""
    one_hot = jnp.eye(num_tasks, dtype=run.losses.dtype)

    def direct(cotangent: Array, scale: Array) -> Array:
        return _sums_of_squares(run.pull_back(cotangent), scale, wanted)

    sums = direct
    if norms == "ghost":
        from gaba_jax import _ghost  # jax.extend may change: nobody else needs it

        sums = _ghost.sums_of_squares(run.pull_back, one_hot[0], wanted)

    def of_all(scale: Array, carry: None) -> tuple[Array, None]:
        return lax.map(lambda task: sums(*task), (one_hot, scale.T)).T, carry

    return _stats.safe_norms(of_all, (len(wanted), num_tasks))[0]


def _sums_of_squares(grads: Any, scale: Array, wanted: tuple[bool, ...]) -> Array:
    """[leaves] sums of squares of one task's gradient; 0 where a leaf is not wanted."""
    return jnp.stack(
        [
            _stats.sum_of_squares(leaf, scale[i]).astype(jnp.float32)
            if wanted[i]
            else jnp.zeros([], jnp.float32)
            for i, leaf in enumerate(jax.tree.leaves(grads))
        ]
    )


def _sum_and_norms(
    run: _Run,
    params: Any,
    present: Bool[Array, " tasks"],
    factors: Callable[[Array], list[Array]],
    *,
    wanted: tuple[bool, ...],
    apart: bool,
    drop: bool,
) -> tuple[Float[Array, "leaves tasks"], Bool[Array, " tasks"], Any]:
    """Norms per leaf and task, the usable tasks, and the sum of their gradients times factors.

    ``factors(usable)`` is [K] per leaf. One backward pass per task, twice where a norm needs
    another scale; a non-finite gradient always does, so one that is dropped is left out by then.
    """
    num_tasks = present.shape[0]

    def pull(index: Array, one_hot: Array) -> Any:
        if apart:
            return lax.switch(
                index, [functools.partial(run.pull_back_one, i) for i in range(num_tasks)]
            )
        return run.pull_back(one_hot)

    def sums(scale: Array, carry: tuple[Array, Any]) -> tuple[Array, tuple[Array, Any]]:
        usable, _ = carry

        def add(total: list[Array], task: Any) -> tuple[list[Array], Any]:
            index, one_hot, scale, factors, used = task
            grads = jax.tree.leaves(pull(index, one_hot))
            terms = [
                factor.astype(t.dtype) * g.astype(t.dtype)
                for factor, t, g in zip(factors, total, grads, strict=True)
            ]
            if apart:
                terms = [jnp.where(used, term, 0) for term in terms]
            finite = jnp.array(True)
            if drop:
                finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in grads]))
            total = [t + term for t, term in zip(total, terms, strict=True)]
            return total, (_sums_of_squares(grads, scale, wanted), finite)

        tasks = (
            jnp.arange(num_tasks),
            jnp.eye(num_tasks, dtype=run.losses.dtype),
            scale.T,
            jnp.stack(factors(usable)).T,
            usable,
        )
        total, (squares, finite) = lax.scan(add, _zeros_to_sum(jax.tree.leaves(params)), tasks)
        return squares.T, (present & finite, total)

    start = (present, _zeros_to_sum(jax.tree.leaves(params)))
    norms, (usable, total) = _stats.safe_norms(sums, (len(wanted), num_tasks), start)
    leaves, structure = jax.tree.flatten(params)
    grads = [t.astype(p.dtype) for t, p in zip(total, leaves, strict=True)]
    return norms, usable, structure.unflatten(grads)


def _no_cosines(measured: Array, norms: Array) -> Array:
    raise AssertionError("this path measures norms alone")


def _check_arguments(
    weighting: Weighting,
    measure: Measure,
    encoder: Callable[..., Any] | None,
    every: int,
    microbatch_size: int | None,
    norms: Norms,
    nonfinite: Nonfinite,
) -> None:
    if measure not in ("exact", "lagged"):
        raise ValueError(f'{measure=} must be "exact" or "lagged".')
    for name, value in (("every", every), ("microbatch_size", microbatch_size)):
        wrong_type = isinstance(value, bool) or not isinstance(value, int)
        if value is not None and (wrong_type or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
    if norms not in ("direct", "ghost"):
        raise ValueError(f'{norms=} must be "direct" or "ghost".')
    if encoder is not None and not callable(encoder):
        raise ValueError(f"{encoder=} must be a function (params, *args) -> features.")
    alone = encoder is None and "cosines" not in weighting.needs
    if norms == "ghost" and not (measure == "exact" and alone and microbatch_size is None):
        raise ValueError(
            'norms="ghost" needs measure="exact", no encoder, no microbatch_size and a weighting '
            "without cosines: elsewhere the gradients are there to be measured."
        )
    if nonfinite == "drop" and (measure == "exact" or not alone or every > 1):
        raise ValueError(
            'nonfinite="drop" needs every gradient apart: use measure="lagged" with every=1, no '
            "encoder and a weighting without cosines, or task_value_and_grad with balance."
        )
