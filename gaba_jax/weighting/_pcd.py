"""PCD: the primary gradient, turned until every other task makes a little progress."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Number, Weighting, check_num_tasks, equal_shares, number
from gaba_jax.weighting._gramian import NEEDS, of_gradients, relative_norms, unit_gramian, usable
from gaba_jax.weighting._moving_average import check_decay, decay_over
from gaba_jax.weighting._quadratic import bounded_qp, nonnegative_qp

_ROUNDING = 1e-6  # of an inner product of combined unit gradients, relative to their coefficients


class PcdState(NamedTuple):
    """State of :func:`pcd`. Names and order are an on-disk promise.

    Attributes:
      mass: [K] float32, the weight that a task's measurements have in its average; 0 before the
        first.
      usual_norms: [K] float32, the root of the average of each task's squared gradient norm.
    """

    mass: Float[Array, " tasks"]
    usual_norms: Float[Array, " tasks"]


def pcd(num_tasks: int, *, primary: int = 0, tau: Number = 0.02, beta: Number = 0.999) -> Weighting:
    r"""Priority-constrained descent: one primary task, and a little progress for every other.

    .. math:: \tilde d = \arg\min_{y} \|y - \tilde g_p\| \ \text{ so that } \
        \langle y, \tilde g_j \rangle \ge \tau\, \|\tilde g_j\|^2 \ \text{for all } j \ne p, \qquad
        d = \frac{\|g_p\|}{\|\tilde d\|}\, \tilde d

    with p the ``primary`` task and :math:`\tilde g_i = g_i / \hat g_i`, where :math:`\hat g_i` is
    the root of the average of task i's squared norms. The average starts at the first measurement.
    So ``tau`` is the part of the progress that a step along its own gradient would bring to a
    secondary task, whatever the scale of its loss. The update has the length of the primary
    gradient, and is that gradient while no constraint binds. With tau = 0 the others only may not
    get worse.

    In terms of the unit gradients' Gramian C it is a quadratic program with one variable per
    secondary task, solved in the cosines. Where no direction meets all constraints they are
    dropped, and the update is the primary gradient: secondary gradients within 0.1 degrees of
    opposite count as opposite, since float32 does not tell. Where a secondary gradient
    opposes the primary one, the constraint wins: the primary loss may then rise to first order.

    When not to use it: where no task comes first. A secondary task whose constraint does not bind
    has weight 0, and so has its head: give :func:`gaba_jax.balance` ``shared=exclude("*_head")``
    and ``weight_task_specific=False``, so that heads get the gradient of their own loss.

    Args:
      num_tasks: number of tasks K.
      primary: the number of the primary task, default 0.
      tau: in [0, 1], default 0.02 as in the paper.
      beta: decay of the averages in [0, 1), default 0.999 as in the paper.

    Returns:
      A :class:`Weighting` with a :class:`PcdState`. The weights are not negative; their sum is
      free. Before the first measurement, and where its gradient is zero, the primary task has
      weight 1 and the others 0. While the primary task is absent those present share weight 1
      equally. Where the direction vanishes, since the primary gradient is opposed and tau is 0, so
      do the weights.

    Raises:
      ValueError: ``primary`` is no task, ``tau`` outside [0, 1], or ``beta`` outside [0, 1).

    References:
      "Not all objectives are born equal: priority-constrained descent for hierarchical
      multi-objective optimization", TMLR 2026, arXiv:2606.29521. The published code adds 1e-8 to
      the average of the squared norms; here nothing is added, so that units do not matter.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.pcd(2))
      >>> grads = {"shared": jnp.array([[3.0, 4.0], [-100.0, 0.0]])}
      >>> updates, _ = tx.update(grads, tx.init({"shared": jnp.zeros(2)}))
      >>> print(np.asarray(updates["shared"]).round(3))  # what opposed the second task is gone
      [-0.125  4.998]
    """
    check_num_tasks(num_tasks)
    if not (isinstance(primary, int | np.integer) and not isinstance(primary, bool)):
        raise ValueError(f"{primary=} must be an integer, the number of a task.")
    if not 0 <= primary < num_tasks:
        raise ValueError(f"{primary=} must be the number of a task, from 0 to {num_tasks - 1}.")
    check_decay("beta", beta)
    part = number("tau", tau)
    if part is not None and not 0 <= part <= 1:
        raise ValueError(f"{tau=} must be in [0, 1].")
    first = np.arange(num_tasks) == primary
    alone = np.asarray(first, np.float32)

    def init() -> PcdState:
        # Buffers of their own, so that the state can be donated.
        return PcdState(*(jnp.zeros([num_tasks], jnp.float32) for _ in range(2)))

    def update(stats: TaskStats, state: PcdState) -> tuple[Array, PcdState]:
        state = _averaged(state, stats, beta)
        gramian, counted = unit_gramian(stats), usable(stats)
        known = jnp.where(state.usual_norms > 0, state.usual_norms, 1)
        sizes = jnp.where(counted, stats.norms / known, 0)
        # In units of the primary gradient, which is 1 then.
        of_primary = jnp.where(counted[primary], sizes[primary], 1)
        wanted = jnp.asarray(tau, jnp.float32) * sizes / of_primary
        secondary = counted & ~first
        # The others' variables stay 0.
        pairs = secondary[:, None] & secondary[None, :]
        matrix = jnp.where(pairs | jnp.eye(num_tasks, dtype=bool), gramian, 0)
        linear = jnp.where(secondary, wanted - gramian[primary], 0)
        exact, short = (solve(matrix, linear)[0] for solve in (nonnegative_qp, bounded_qp))
        # No direction meets all constraints where one is missed by a gain that is wanted. With none
        # wanted there is one, and coefficients that float32 does not tell stay short.
        least = jnp.min(jnp.where(secondary, wanted, jnp.inf))
        missed = jnp.max(jnp.where(secondary, linear - _product(matrix, exact), 0))
        met = missed <= jnp.maximum(least / 2, _ROUNDING)
        added = jnp.where(least > 0, jnp.where(met, exact, 0), short)
        added = jnp.where(secondary, added, 0)
        direction = jnp.where(first, 1, added)
        square = direction @ _product(gramian, direction)
        vanishes = square <= _ROUNDING * jnp.sum(direction) ** 2
        length = jnp.sqrt(jnp.where(vanishes, 1, square))
        scale = jnp.where(vanishes, 0, relative_norms(stats)[primary] / length)
        weights = of_gradients(direction * scale, stats, 0)
        weights = jnp.where(counted[primary], weights, alone)
        return jnp.where(stats.present[primary], weights, equal_shares(stats.present)), state

    return Weighting(num_tasks, NEEDS, init, update, alone)


def _averaged(state: PcdState, stats: TaskStats, beta: Number) -> PcdState:
    """The averages of the present tasks' squared norms, from their roots, which fit float32."""
    decay = jnp.where(stats.present, decay_over(beta, stats.elapsed), 1)
    mass = decay * state.mass + 1 - decay
    share = (1 - decay) / jnp.where(mass > 0, mass, 1)
    largest = jnp.maximum(state.usual_norms, stats.norms)
    unit = jnp.where(largest > 0, largest, 1)
    before, now = state.usual_norms / unit, stats.norms / unit
    return PcdState(mass, unit * jnp.sqrt((1 - share) * before**2 + share * now**2))


def _product(matrix: Array, vector: Array) -> Array:
    return jnp.matmul(matrix, vector, precision="highest")
