"""Weightings as optax transforms that turn stacked gradients into one balanced update."""

import inspect
from collections.abc import Callable
from types import EllipsisType
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax import weighting as weightings
from gaba_jax._checks import check_driver_arguments, check_stacked
from gaba_jax._selection import Groups, Selector, check_groups, select
from gaba_jax._state import (
    advance,
    check_state,
    init_state,
    leaves_of,
    needed_losses,
    reads_of,
    task_presence,
)
from gaba_jax._statistics import Reads, measure_stacked, weighted, whole_leaves
from gaba_jax.weighting._base import Number, Weighting, check_weighting
from gaba_jax.weighting._gradnorm import Variant
from gaba_jax.weighting._stabilize import Floor

Nonfinite = Literal["propagate", "drop"]
_Transform = TypeVar("_Transform", bound=Callable[..., optax.GradientTransformationExtraArgs])


def balance(
    weighting: Weighting,
    *,
    shared: Selector | None = None,
    measure_on: Selector | None = None,
    weight_task_specific: bool = True,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Balances stacked task gradients with any weighting. First in the chain.

    .. math:: u = \sum_i \lambda_i \nabla L_i

    with the weights :math:`\lambda` held constant. It reads gradients with a leading task axis, as
    :func:`gaba_jax.task_value_and_grad` returns them, and emits updates of the parameters' own
    shapes and dtypes, for any optax transform after it.

    Args:
      weighting: a rule from :mod:`gaba_jax.weighting`.
      shared: the parameters that the tasks share, on which the gradient norms are taken: a pytree
        of bools, a callable ``params -> mask``, :func:`gaba_jax.exclude` or
        :func:`gaba_jax.only`. None (default) finds them from the gradients: a leaf is shared once
        two tasks have had a nonzero gradient on it. (One leaf that holds all heads, [d, K], counts
        as shared.)
      measure_on: the shared parameters on which norms are taken, given in the same ways; default
        all of them.
      weight_task_specific: True (default) gives task-specific leaves ``w_i g_i``, the gradient of
        the weighted loss; False gives them plain ``g_i``, and needs an explicit ``shared``.
      nonfinite: "propagate" (default) leaves NaN and Inf in the update (pair it with
        ``optax.apply_if_finite`` after this transform); "drop" leaves a task with a non-finite
        value on any leaf out of this update and rescales the weights of the others. Either way
        a non-finite norm on the measured parameters leaves average and step untouched.

    Returns:
      A transform with a :class:`BalanceState`. Its ``update(updates, state, params=None, *,
      task_losses=None, task_mask=None)`` takes leaves [K, \*param.shape]; ``task_losses`` [K], for
      weightings that need them; ``task_mask`` [K] bool, the tasks that are in this batch. The
      gradient of an absent task is never read. Other extra arguments are ignored.

    Raises:
      ValueError: on a wrong argument, at construction; on a selection that holds no parameter, at
        ``init``; on a wrong shape or a missing ``task_losses``, when ``update`` is traced.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gaba_jax import balance, task_value_and_grad, weighting
      >>> def losses_fn(params, x):
      ...     h = jnp.tanh(x @ params["backbone"])
      ...     return 500.0 * jnp.mean(h @ params["a"]), jnp.mean((h @ params["b"]) ** 2)
      >>> params = {"backbone": jnp.ones((3, 2)), "a": jnp.ones(2), "b": jnp.ones(2)}
      >>> tx = optax.chain(balance(weighting.inverse_norm(2)), optax.sgd(1e-2))
      >>> opt_state = tx.init(params)
      >>> losses, grads = task_value_and_grad(losses_fn)(params, jnp.ones((4, 3)))
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> state = opt_state[0]
      >>> contributions = state.task_weights * state.task_norms  # equal, 500x apart before
      >>> bool(jnp.allclose(contributions[0], contributions[1]))
      True
    """
    return _transform(weighting, None, shared, measure_on, weight_task_specific, nonfinite)


def by_group(
    weighting: Weighting,
    groups: Groups | None = None,
    *,
    shared: Selector | None = None,
    measure_on: Selector | None = None,
    weight_task_specific: bool = True,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Balances every group of parameters by itself: :func:`balance`, with weights per group.

    .. math:: u^{(g)} = \sum_i \lambda^{(g)}_i\, \nabla_{\theta^{(g)}} L_i

    for each group g of parameters :math:`\theta^{(g)}`, with the weights that the rule gives for
    the norms and cosines of the gradients in that group, and a state of its own. So layers in which
    the tasks conflict are balanced apart from those in which they agree, and ``gradnorm`` is
    layer-wise.

    When not to use it: the update is no longer the gradient of any weighted loss, so what a rule
    promises (no conflict, equal contributions) holds in each group, not for the whole. Where the
    groups have weights of different sums, they learn at different rates. Of a rule that draws at
    random all groups have the same draws.

    A group in which no two tasks share a parameter, such as a head, has the rule's initial weights
    all the time (1/K for most). With ``weight_task_specific=False`` heads get plain gradients.

    Args:
      weighting: a rule from :mod:`gaba_jax.weighting`.
      groups: None or "top" (default), one group for each top-level key of the parameters; "leaf",
        one for each leaf; or a function ``params -> names``, with a pytree of strings in the
        structure of the parameters or a prefix of it. :func:`group_names` gives the names in order.
      shared: see :func:`balance`.
      measure_on: see :func:`balance`; a group without a leaf in it is not measured.
      weight_task_specific: see :func:`balance`.
      nonfinite: see :func:`balance`. A non-finite norm in a group holds that group's average alone;
        "drop" leaves the task out of all groups.

    Returns:
      A transform like :func:`balance`'s, whose :class:`BalanceState` has a leading axis of groups:
      ``task_weights`` are [G, K]. ``balance_metrics(opt_state, group_names=...)`` reads it.

    Raises:
      ValueError: as :func:`balance`; on ``groups`` that name no group for some parameter, at
        ``init``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import balance_metrics, by_group, group_names, weighting
      >>> params = {"first": jnp.zeros(2), "last": jnp.zeros(2)}
      >>> tx = optax.chain(by_group(weighting.inverse_norm(2)), optax.sgd(1e-2))
      >>> grads = {"first": jnp.array([[3.0, 0.0], [0.0, 1.0]]),
      ...          "last": jnp.array([[1.0, 0.0], [0.0, 9.0]])}
      >>> updates, opt_state = tx.update(grads, tx.init(params), params)
      >>> print(opt_state[0].task_weights)  # of the first group, and of the last
      [[0.25 0.75]
       [0.9  0.1 ]]
      >>> metrics = balance_metrics(opt_state, ["rul", "health"], group_names(params))
      >>> print(f"{metrics['last/weight/health']:.1f}")
      0.1
    """
    groups = "top" if groups is None else groups
    check_groups(groups)
    return _transform(weighting, groups, shared, measure_on, weight_task_specific, nonfinite)


def _transform(
    weighting: Weighting,
    groups: Groups | None,
    shared: Selector | None,
    measure_on: Selector | None,
    weight_task_specific: bool,
    nonfinite: Nonfinite,
) -> optax.GradientTransformationExtraArgs:
    """What :func:`balance` and :func:`by_group` are."""
    check_weighting(weighting)
    check_driver_arguments(shared, weight_task_specific, nonfinite)
    num_tasks = weighting.num_tasks

    def init_fn(params: Any) -> Any:
        selection = select(shared, measure_on, params, groups=groups)
        return init_state(weighting, len(jax.tree.leaves(params)), selection.num_groups())

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        task_losses: ArrayLike | None = None,
        task_mask: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        if "value_fn" in extra_args:
            raise ValueError(
                "value_fn is for a line search (optax.lbfgs), which would compare the losses of "
                "value_fn along a gradient that is weighted otherwise. Hold the weights instead: "
                "give optax.lbfgs alone, without gaba() or balance(...) in its chain, the value "
                "and the gradient of sum_i task_weights[i] * losses[i]."
            )
        check_stacked(updates, params, num_tasks, leaves_of(state))
        like_params = jax.tree.map(lambda u: u[0], updates) if params is None else params
        selection = select(shared, measure_on, like_params, weight_task_specific, groups)
        check_state(state, leaves_of(state), weighting, selection.num_groups())
        task_losses = needed_losses(weighting, task_losses)
        present = task_presence(task_mask, num_tasks)
        leaves, structure = jax.tree.flatten(updates)
        measurement, usable = None, present
        reads, drop = reads_of(weighting), nonfinite == "drop"
        if reads is not None or drop:
            measurement = measure_stacked(
                leaves, selection.wanted(every=drop), num_tasks, reads or Reads()
            )
            if drop:
                usable = present & jnp.all(jnp.isfinite(measurement.norms), axis=0)
        state = advance(
            weighting,
            selection,
            state,
            None if reads is None else measurement,
            task_losses=task_losses,
            present=present,
            usable=usable,
        )
        read = None if task_mask is None and not drop else usable
        factors = selection.coefficients(state.task_weights, usable)
        combined = [
            weighted(leaf, each, read)
            for leaf, each in zip(whole_leaves(leaves), factors, strict=True)
        ]
        return structure.unflatten(combined), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _documented_by(rule: Callable[..., Weighting]) -> Callable[[_Transform], _Transform]:
    """Writes what a rule, and ``balance``, say of their arguments into a transform's docstring.

    So each thing is said once, and ``help(gaba)`` says it all.
    """

    def document(transform: _Transform) -> _Transform:
        own, of_rule, of_balance = (inspect.getdoc(each) for each in (transform, rule, balance))
        if own and of_rule and of_balance:  # python -OO leaves none
            start, rest = own.split("Returns:\n", 1)
            about, arguments = of_rule.split("\n\n", 1)[1].split("Args:\n", 1)
            drivers = of_balance.split("Args:\n", 1)[1].split("\n", 1)[1]  # after `weighting`
            listed = [text.split("\n\n", 1)[0] for text in (arguments, drivers)]
            transform.__doc__ = (
                f"{start}{about}Args:\n" + "\n".join(listed) + f"\n\nReturns:\n{rest}"
            )
        return transform

    return document


@_documented_by(weightings.gaba)
def gaba(
    num_tasks: int = 2,
    *,
    beta: Number = 0.99,
    warmup_steps: int | Array = 100,
    min_weight: Number = 0.05,
    floor: Floor = "renormalize",
    debias: bool = False,
    task_priorities: ArrayLike | None = None,
    shared: Selector | None = None,
    measure_on: Selector | None = None,
    weight_task_specific: bool = True,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient-Aware Balanced Adaptation of K losses that share one model, as published.

    It is ``balance(weighting.gaba(...))``.

    Returns:
      A transform that turns leaves [K, \*param.shape] into leaves [\*param.shape]; see
      :func:`balance`. First in the chain.

    Raises:
      ValueError: as :func:`gaba_jax.weighting.gaba`, or any of the errors of :func:`balance`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gaba_jax import gaba, task_value_and_grad
      >>> def losses_fn(params, x, rul, health):
      ...     h = jnp.tanh(x @ params["backbone"])
      ...     rul_loss = jnp.mean((h @ params["rul_head"] - rul) ** 2)
      ...     logits = h @ params["health_head"]
      ...     return rul_loss, optax.losses.softmax_cross_entropy_with_integer_labels(
      ...         logits, health).mean()
      >>> params = {"backbone": jnp.ones((4, 8)), "rul_head": jnp.ones(8),
      ...           "health_head": jnp.ones((8, 3))}
      >>> tx = optax.chain(gaba(), optax.adamw(1e-3))
      >>> opt_state = tx.init(params)
      >>> @jax.jit
      ... def train_step(params, opt_state, *batch):
      ...     losses, grads = task_value_and_grad(losses_fn)(params, *batch)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     return optax.apply_updates(params, updates), opt_state, losses
      >>> batch = jnp.ones((5, 4)), jnp.full(5, 100.0), jnp.arange(5) % 3
      >>> params, opt_state, losses = train_step(params, opt_state, *batch)
      >>> optax.tree.get(opt_state, "task_weights")  # 1/K during the warm-up
      Array([0.5, 0.5], dtype=float32)
    """
    return balance(
        weightings.gaba(
            num_tasks,
            beta=beta,
            warmup_steps=warmup_steps,
            min_weight=min_weight,
            floor=floor,
            debias=debias,
            task_priorities=task_priorities,
        ),
        shared=shared,
        measure_on=measure_on,
        weight_task_specific=weight_task_specific,
        nonfinite=nonfinite,
    )


@_documented_by(weightings.equalize)
def equalize(
    num_tasks: int,
    *,
    ratios: ArrayLike | None = None,
    anchor: int | None = None,
    beta: Number = 0.9,
    rho: Number = 0.1,
    shared: Selector | None = None,
    measure_on: Selector | None = None,
    weight_task_specific: bool = True,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Balances K losses so that their contributions are in the ratios that you give.

    It is ``balance(weighting.equalize(...))``.

    Returns:
      A transform that turns leaves [K, \*param.shape] into leaves [\*param.shape]. First in the
      chain.

    Raises:
      ValueError: as :func:`gaba_jax.weighting.equalize`, or any of the errors of :func:`balance`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import equalize, task_value_and_grad
      >>> def losses_fn(params, x):
      ...     h = jnp.tanh(x @ params["backbone"])
      ...     return (50.0 * jnp.mean((h @ params["a"] - 1) ** 2), jnp.mean((h @ params["b"]) ** 2),
      ...             0.1 * jnp.mean((h @ params["c"] + 1) ** 2))
      >>> params = {"backbone": jnp.ones((3, 2))} | {name: jnp.ones(2) for name in "abc"}
      >>> tx = optax.chain(equalize(3), optax.adamw(1e-3))
      >>> opt_state = tx.init(params)
      >>> losses, grads = task_value_and_grad(losses_fn)(params, jnp.ones((4, 3)))
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> contributions = opt_state[0].task_weights * opt_state[0].task_norms
      >>> bool(jnp.allclose(contributions, contributions[0]))
      True
    """
    return balance(
        weightings.equalize(num_tasks, ratios=ratios, anchor=anchor, beta=beta, rho=rho),
        shared=shared,
        measure_on=measure_on,
        weight_task_specific=weight_task_specific,
        nonfinite=nonfinite,
    )


@_documented_by(weightings.gradnorm)
def gradnorm(
    num_tasks: int = 2,
    *,
    alpha: Number = 1.5,
    weight_optimizer: optax.GradientTransformation | None = None,
    variant: Variant = "canonical",
    coefficient: Number | None = None,
    min_weight: Number | EllipsisType | None = ...,
    total: Number | None = None,
    initial_losses: ArrayLike | None = None,
    shared: Selector | None = None,
    measure_on: Selector | None = None,
    weight_task_specific: bool = True,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""GradNorm (Chen et al., ICML 2018): weights learned from gradient norms and training rates.

    It is ``balance(weighting.gradnorm(...))``. The original measures the last shared layer alone:
    ``measure_on=only("...")``.

    Returns:
      A transform that turns leaves [K, \*param.shape] into leaves [\*param.shape] and needs
      ``task_losses=`` at update; see :func:`balance`. First in the chain. (In a Flax Linen train
      state: ``gaba_jax.linen.TrainState``.)

    Raises:
      ValueError: as :func:`gaba_jax.weighting.gradnorm`, or any of the errors of :func:`balance`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import gradnorm, task_value_and_grad
      >>> def losses_fn(params, x):
      ...     h = jnp.tanh(x @ params["backbone"])
      ...     return 50.0 * jnp.mean((h @ params["a"] - 1) ** 2), jnp.mean((h @ params["b"]) ** 2)
      >>> params = {"backbone": jnp.ones((3, 2)), "a": jnp.ones(2), "b": jnp.ones(2)}
      >>> tx = optax.chain(gradnorm(), optax.adamw(1e-3))
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):
      ...     losses, grads = task_value_and_grad(losses_fn)(params, jnp.ones((4, 3)))
      ...     updates, opt_state = tx.update(grads, opt_state, params, task_losses=losses)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.allclose(opt_state[0].task_weights, jnp.array([0.975, 1.025])))  # one Adam step
      True
    """
    return balance(
        weightings.gradnorm(
            num_tasks,
            alpha=alpha,
            weight_optimizer=weight_optimizer,
            variant=variant,
            coefficient=coefficient,
            min_weight=min_weight,
            total=total,
            initial_losses=initial_losses,
        ),
        shared=shared,
        measure_on=measure_on,
        weight_task_specific=weight_task_specific,
        nonfinite=nonfinite,
    )
