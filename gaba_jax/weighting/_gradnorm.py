"""GradNorm: weights learned so that every task pulls in proportion to how far it lags behind."""

from types import EllipsisType
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    LARGEST,
    Number,
    Weighting,
    as_float32,
    check_not_negative,
    check_num_tasks,
    check_optimizer,
    check_positive,
    descend,
    share_out,
    task_losses,
    task_vector,
)

Variant = Literal["canonical", "published"]


class GradNormState(NamedTuple):
    """State of :func:`gradnorm`. Names and order are an on-disk promise.

    Attributes:
      learned_weights: [K] float32, the weights that the next update applies.
      optimizer_state: the state of ``weight_optimizer``.
      initial_losses: [K] float32, L_i(0); 0 until the task's first positive loss.
    """

    learned_weights: Float[Array, " tasks"]
    optimizer_state: Any
    initial_losses: Float[Array, " tasks"]


def gradnorm(
    num_tasks: int,
    *,
    alpha: Number = 1.5,
    weight_optimizer: optax.GradientTransformation | None = None,
    variant: Variant = "canonical",
    coefficient: Number | None = None,
    min_weight: Number | EllipsisType | None = ...,
    total: Number | None = None,
    initial_losses: ArrayLike | None = None,
) -> Weighting:
    r"""GradNorm (Chen et al., ICML 2018): weights learned from gradient norms and training rates.

    The weights w minimise

    .. math::
        c \sum_i |G_i - \bar G\, r_i^\alpha|, \qquad G_i = |w_i|\, g_i, \quad
        \bar G = \frac{1}{K} \sum_i G_i, \quad r_i = \frac{\rho_i}{\frac{1}{K} \sum_j \rho_j},
        \quad \rho_i = \frac{L_i}{L_i(0)}

    with :math:`g_i` the norm of task i's gradient and the target :math:`\bar G r_i^\alpha` held
    constant. That gradient has a closed form, so nothing is differentiated twice:

    .. math:: \frac{\partial}{\partial w_i} = c\, \mathrm{sign}(w_i)\, s_i\, g_i, \qquad
        s_i = \mathrm{sign}(G_i - \bar G\, r_i^\alpha)

    ``weight_optimizer`` takes one step along it; then the weights are clamped to ``min_weight`` and
    rescaled to ``total``. An update applies the weights from before its own step, 1 each at first.
    A task that lags (:math:`r_i > 1`) has the larger target, so its weight **rises**: norms
    (10, 1, 1) and rates (2, .5, .5) give :math:`\partial / \partial w_1 = -10`. At least one public
    implementation has the sign of :math:`\alpha` inverted and slows such a task down further.

    ``variant="published"`` is the baseline that GABA was published against: :math:`r_i = \rho_i`
    without the mean, the target not held constant,

    .. math:: \frac{\partial}{\partial w_i} = c\, \mathrm{sign}(w_i)\, g_i
        \left(s_i - \frac{1}{K} \sum_j s_j r_j^\alpha\right)

    and other defaults. Its weights can become negative: that is the published failure.

    When not to use it: where norms differ by far more than one step of the optimizer can resolve,
    it only circles its balance point (:func:`gaba_jax.weighting.gradnorm_balance_point`), and for
    rates that differ it has none unless :math:`\frac{1}{K} \sum_i r_i^\alpha = 1`. For K = 2 and
    alpha = 0 the balance point is :func:`gaba_jax.weighting.inverse_share`, which needs no
    learning. Adam's first steps are equal in size, so where all tasks are below their targets (as
    in the example above) rescaling cancels them. Losses must be positive.

    An absent task keeps its weight and L(0), and the means are over the others. Losses below 0
    count as 0; a task's rate is 1 until it has an L(0). :func:`gaba_jax.weighting.stabilize` around
    it bounds the weights that are applied; ``min_weight`` here bounds the learned ones.

    Args:
      num_tasks: number of tasks K >= 2.
      alpha: strength of the pull towards equal rates, >= 0, default 1.5; 0 equalises the norms.
      weight_optimizer: any optax optimizer; default ``optax.adam(0.025)``, published
        ``optax.sgd(0.05)``. A plain SGD step is proportional to the norms, and explodes where they
        are in the tens.
      variant: "canonical" (default) or "published".
      coefficient: the factor c > 0, default 1, published 0.1.
      min_weight: least learned weight, >= 0, or None for no guard, as in both papers; default 1e-3,
        published None. Rescaling comes after it, and can end below it.
      total: the sum of the weights, default K; published not rescaled. Weights whose sum is zero
        are made equal.
      initial_losses: [K] positive, L(0); default each task's first positive loss.

    Returns:
      A :class:`Weighting` with a :class:`GradNormState`; it needs ``task_losses`` at update. Its
      weights sum to ``total``, K by default, not 1.

    Raises:
      ValueError: ``num_tasks`` < 2; ``alpha`` or ``min_weight`` negative; ``coefficient`` or
        ``total`` not positive; K ``min_weight`` above the sum; an unknown ``variant``; a
        ``weight_optimizer`` that is none; ``initial_losses`` not a positive [K].

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from gaba_jax import weighting
      >>> rule = weighting.gradnorm(
      ...     3, weight_optimizer=optax.sgd(0.01), initial_losses=[1.0, 1.0, 1.0])
      >>> stats = weighting.TaskStats(
      ...     norms=jnp.array([10.0, 1.0, 1.0]), cosines=None, losses=jnp.array([2.0, 0.5, 0.5]),
      ...     present=jnp.ones(3, bool), elapsed=jnp.int32(1))
      >>> weights, state = rule.update(stats, rule.init())
      >>> print(weights, np.asarray(state.learned_weights).round(3))  # the slow first task rises
      [1. 1. 1.] [1.058 0.971 0.971]
    """
    check_num_tasks(num_tasks, least=2)
    if variant not in ("canonical", "published"):
        raise ValueError(f'{variant=} must be "canonical" or "published".')
    canonical = variant == "canonical"
    default = optax.adam(0.025) if canonical else optax.sgd(0.05)
    optimizer = check_optimizer(default if weight_optimizer is None else weight_optimizer)
    factor = (1.0 if canonical else 0.1) if coefficient is None else coefficient
    least = (1e-3 if canonical else None) if isinstance(min_weight, EllipsisType) else min_weight
    sum_ = float(num_tasks) if total is None and canonical else total
    check_not_negative("alpha", alpha)
    check_positive("coefficient", factor)
    lowest = None if least is None else check_not_negative("min_weight", least)
    highest = None if sum_ is None else check_positive("total", sum_)
    if lowest is not None and highest is not None and num_tasks * lowest > highest:
        raise ValueError(
            f"min_weight={least} is too large: {num_tasks} weights that sum to {sum_} cannot all "
            "be at least that."
        )
    given = task_vector("initial_losses", initial_losses, num_tasks)
    initial_weights = as_float32([1.0 if sum_ is None else sum_ / num_tasks] * num_tasks)

    def init() -> GradNormState:
        # Buffers of their own, so that the state can be donated.
        return GradNormState(
            learned_weights=jnp.array(initial_weights),
            optimizer_state=optimizer.init(jnp.array(initial_weights)),
            initial_losses=jnp.zeros([num_tasks], jnp.float32)
            if given is None
            else jnp.array(given),
        )

    def update(stats: TaskStats, state: GradNormState) -> tuple[Array, GradNormState]:
        weights, present = state.learned_weights, stats.present
        losses = jnp.maximum(task_losses(stats), 0)
        first = present & (state.initial_losses == 0)
        initial = jnp.where(first, losses, state.initial_losses)
        rates = jnp.where(initial > 0, losses / jnp.where(initial > 0, initial, 1), 1)
        rates = jnp.minimum(rates, LARGEST)
        if canonical:
            mean_rate = _mean(rates, present)
            rates = jnp.where(mean_rate > 0, rates / jnp.where(mean_rate > 0, mean_rate, 1), 1)
        targets = jnp.minimum(rates ** jnp.asarray(alpha, jnp.float32), LARGEST)
        largest = jnp.max(stats.norms)
        weighted = jnp.abs(weights) * (stats.norms / jnp.where(largest > 0, largest, 1))
        signs = jnp.sign(weighted - _mean(weighted, present) * targets)
        pull = signs if canonical else signs - _mean(signs * targets, present)
        # A weight of zero counts as positive, or it would stay zero for good.
        pull = pull * jnp.where(weights < 0, -1.0, 1.0) * jnp.asarray(factor, jnp.float32)
        learned, optimizer_state = descend(
            optimizer, pull * stats.norms, state.optimizer_state, weights, present
        )
        if least is not None:
            learned = jnp.maximum(learned, jnp.asarray(least, jnp.float32))
        if sum_ is not None:
            # Divided by its sum even if that is negative: without a guard nothing is hidden.
            learned = jnp.where(present, learned, 0)
            learned = jnp.where(jnp.sum(learned) == 0, present.astype(jnp.float32), learned)
            held = sum_ - jnp.sum(jnp.where(present, 0, weights))
            learned = learned / jnp.sum(learned) * held
        return weights, GradNormState(
            learned_weights=jnp.where(present, learned, weights),
            optimizer_state=optimizer_state,
            initial_losses=initial,
        )

    return Weighting(
        num_tasks,
        frozenset({"norms", "losses"}),
        init,
        update,
        initial_weights,
        absent="each" if total is None else "rescale",
    )


def gradnorm_balance_point(
    norms: ArrayLike, losses: ArrayLike, initial_losses: ArrayLike, alpha: Number = 1.5
) -> Float[Array, " tasks"]:
    r"""The weights whose contributions are in the ratio of GradNorm's targets.

    .. math:: w_i \propto \frac{r_i^\alpha}{g_i}, \qquad \sum_i w_i = 1

    Only the ratios of the rates :math:`r_i = L_i / L_i(0)` count, so the point is the same with
    their mean divided out. Equal rates, or alpha = 0, give :func:`inverse_norm`, and
    :func:`inverse_share` for K = 2. :func:`gradnorm` itself rests there only where its targets sum
    to the norms, :math:`\frac{1}{K} \sum_i r_i^\alpha = 1` for the rates relative to their mean:
    equal rates, alpha = 0 or alpha = 1. Elsewhere no weights meet all targets, and it circles
    another point.

    Args:
      norms: [K] gradient norms g.
      losses: [K] losses, not negative.
      initial_losses: [K] losses at the start, positive.
      alpha: as in :func:`gradnorm`.

    Returns:
      [K] weights >= 0 that sum to 1. Tasks of norm zero, if there are any, share the whole weight.

    Raises:
      ValueError: an argument is not [K], or ``alpha`` is negative.

    Example:
      >>> from gaba_jax import weighting
      >>> weighting.gradnorm_balance_point([5.0, 0.01], [10.0, 0.5], [20.0, 2.0]).round(6)
      Array([0.005625, 0.994375], dtype=float32)
    """
    check_not_negative("alpha", alpha)
    g, now, start = (jnp.asarray(x, jnp.float32) for x in (norms, losses, initial_losses))
    if g.ndim != 1 or not g.shape == now.shape == start.shape:
        raise ValueError(
            "norms, losses and initial_losses must be [K], one value per task; "
            f"got shapes {g.shape}, {now.shape} and {start.shape}."
        )
    rates = now / start
    fastest = jnp.max(rates)
    relative = jnp.where(fastest > 0, rates / jnp.where(fastest > 0, fastest, 1), 1)
    inverse = jnp.where(g > 0, jnp.min(g) / jnp.where(g > 0, g, 1), 1)
    raw = relative ** jnp.asarray(alpha, jnp.float32) * inverse
    return share_out(raw, jnp.ones(g.shape, bool), 1.0)


def _mean(values: Float[Array, " tasks"], present: Bool[Array, " tasks"]) -> Float[Array, ""]:
    """The mean over the present tasks."""
    count = jnp.maximum(jnp.sum(present), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(present, values, 0)) / count
