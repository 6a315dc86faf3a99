"""The average of each task's norm, over the updates that the task takes part in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaba_jax import weighting
from gaba_jax.weighting import TaskStats


def one_task(task, norm, elapsed=1, num_tasks=3):
    """What is measured on a batch of one task."""
    present = jnp.arange(num_tasks) == task
    return TaskStats(jnp.where(present, norm, 0.0), None, None, present, jnp.int32(elapsed))


def test_tasks_that_come_one_at_a_time_are_weighted_together():
    """The rule's first weights until each task was seen, then what it makes of the averages."""
    rule = weighting.average_norms(weighting.rescaled(weighting.inverse_norm(3), 7.0), beta=0.9)
    state, applied = rule.init(), []
    for task in [0, 0, 1, 2]:
        weights, state = rule.update(one_task(task, [2.0, 4.0, 8.0][task]), state)
        applied.append(weights)
    np.testing.assert_allclose(applied[:3], np.full((3, 3), 7 / 3), rtol=1e-6)
    np.testing.assert_allclose(applied[3], [4, 2, 1], rtol=1e-6)


@pytest.mark.parametrize("every", [1, 3])
def test_averages_are_means_over_the_updates_of_each_task(every):
    """A measurement's weight decays with the updates since, whichever task they were of."""
    random = np.random.default_rng(1)
    tasks, norms = random.integers(0, 3, 40), random.uniform(1, 5, 40).astype(np.float32)
    tasks[:3] = [0, 1, 2]
    rule = weighting.average_norms(weighting.inverse_norm(3), beta=0.9)
    update, state = jax.jit(rule.update), rule.init()
    for task, norm in zip(tasks, norms, strict=True):
        weights, state = update(one_task(task, norm, every), state)
    counts = 0.9 ** (every * np.arange(39, -1, -1.0))
    mean = [np.average(norms[tasks == i], weights=counts[tasks == i]) for i in range(3)]
    np.testing.assert_allclose(state.ema_norms, mean, rtol=1e-5)
    np.testing.assert_allclose(weights, 1 / np.array(mean) / np.sum(1 / np.array(mean)), rtol=1e-5)


def test_the_norm_of_a_task_long_absent_is_kept():
    """Its mass would underflow after 9,000 updates at beta = 0.99."""
    rule = weighting.average_norms(weighting.inverse_share(2))
    state = rule.init()
    _, state = rule.update(one_task(0, 3.0, num_tasks=2), state)
    _, state = rule.update(one_task(1, 1.0, 20_000, num_tasks=2), state)
    weights, state = rule.update(one_task(1, 1.0, 20_000, num_tasks=2), state)
    np.testing.assert_allclose(weights, [0.25, 0.75], rtol=1e-6)
    weights, _ = rule.update(one_task(0, 1.0, num_tasks=2), state)
    np.testing.assert_allclose(weights, [0.5, 0.5], rtol=1e-5)


def test_with_all_tasks_present_they_differ_from_averaged_weights_by_the_mean():
    """The same at constant norms; at (1, 3) then (3, 1) the mean of the norms is (2, 2)."""
    inner = weighting.inverse_share(2)
    of_weights = weighting.stabilize(inner, beta=0.5, warmup_steps=0, debias=True)
    stats = TaskStats(jnp.array([1.0, 3.0]), None, None, jnp.ones(2, bool), jnp.int32(1))
    weights = []
    for rule in (of_weights, weighting.average_norms(inner, beta=0.5)):
        first, state = rule.update(stats, rule.init())
        second, state = rule.update(stats, state)
        np.testing.assert_allclose(first, [0.75, 0.25], rtol=1e-6)
        np.testing.assert_allclose(second, first, rtol=1e-6)
        last, _ = rule.update(stats._replace(norms=jnp.array([3.0, 1.0])), state)
        weights.append(last)
    shares = np.array([0.375, 0.5]) / 0.875  # of the first two updates, and of the last
    np.testing.assert_allclose(weights[0], shares @ [[0.75, 0.25], [0.25, 0.75]], rtol=1e-6)
    mean = shares @ [[1, 3], [3, 1]]
    np.testing.assert_allclose(weights[1], mean[::-1] / mean.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "needs"),
    [
        (weighting.uniform(2), "needs nothing"),
        (weighting.uncertainty(2), "needs losses"),
        (weighting.mgda(2), "needs cosines, norms"),
        (weighting.inverse_dirichlet(2), "needs std"),
    ],
)
def test_only_norms_can_be_averaged_for_absent_tasks(rule, needs):
    with pytest.raises(ValueError, match=needs):
        weighting.average_norms(rule)


@pytest.mark.parametrize("beta", [1.0, -0.1, 0.99999999])
def test_a_decay_that_never_moves_is_refused(beta):
    with pytest.raises(ValueError, match=rf"beta={beta} must be in \[0, 1\), in float32 too"):
        weighting.average_norms(weighting.inverse_norm(2), beta=beta)
    with pytest.raises(ValueError, match=rf"beta={beta} must be in \[0, 1\), in float32 too"):
        weighting.equalize(2, beta=beta)
