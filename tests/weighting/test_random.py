"""Random loss weighting: seeded, new at every update, on the simplex."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaba_jax import balance, weighting


def test_seeded_and_new_at_every_update(weigh):
    weights = weigh(weighting.random(3, seed=1), np.ones(3), 50)
    np.testing.assert_array_equal(weights, weigh(weighting.random(3, seed=1), np.ones(3), 50))
    assert len(np.unique(weights, axis=0)) == 50
    other = weigh(weighting.random(3, seed=2), np.ones(3), 50)
    assert not np.isclose(weights, other).all(axis=1).any()


def test_softmax_of_normals(weigh):
    weights = weigh(weighting.random(4), np.ones(4), 4000)
    assert weights.min() > 0
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights.mean(axis=0), 0.25, atol=0.01)
    logits = np.log(weights) - np.log(weights).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(logits.std(axis=0), np.sqrt(3 / 4), rtol=0.05)


def test_the_key_is_plain_data_and_resumes():
    tx, grads = balance(weighting.random(2)), jnp.ones((2, 3))
    _, state = tx.update(grads, tx.init(grads[0]))
    assert state.weighting_state.key_data.dtype == jnp.uint32
    restored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state)
    _, expected = tx.update(grads, state)
    _, actual = tx.update(grads, restored)
    np.testing.assert_array_equal(actual.task_weights, expected.task_weights)
    assert not np.allclose(expected.task_weights, state.task_weights)


def test_seeds_side_by_side(weigh):
    def run(seed):
        return weigh(weighting.random(2, seed=seed), np.ones(2), 3)

    batched = jax.vmap(run)(jnp.arange(3))
    np.testing.assert_allclose(batched, [run(seed) for seed in range(3)], rtol=1e-6)


@pytest.mark.parametrize("seed", [-1, 0.5, 2**32])
def test_errors(seed):
    with pytest.raises(ValueError, match=r"must be a whole number from 0 to 2\*\*32 - 1"):
        weighting.random(2, seed=seed)
