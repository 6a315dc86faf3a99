"""diagnose: what it measures, what it says of it, and that it fits the page."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaba_jax
from gaba_jax import balance, diagnose, exclude, only, weighting
from gaba_jax.turbofan import diagnosis
from gaba_jax.turbofan.train import TrainConfig, load_data, train
from tests.slow import rest_slow


def linear(*directions):
    """Losses ``w @ direction`` on a shared w, whose gradients are the directions themselves."""
    rows = jnp.array(directions, jnp.float32)
    return (lambda params, x: list(rows @ params["w"] * jnp.mean(x))), {"w": jnp.zeros(2)}


ONES = [(jnp.ones(4),)]


def test_it_measures_what_the_transform_measures(toy):
    losses_fn, params, (x, y) = toy
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    found = diagnose(losses_fn, params, batches)
    tx = balance(weighting.upgrad(2))
    update = jax.jit(tx.update)
    jacobian = jax.jit(jax.jacrev(lambda p, *b: jnp.stack(jax.tree.leaves(losses_fn(p, *b)))))
    for n, batch in enumerate(batches):
        losses = losses_fn(params, *batch)
        grads = jacobian(params, *batch)
        state = update(grads, tx.init(params), params)[1]
        np.testing.assert_allclose(found.norms[n], state.task_norms, rtol=1e-5)
        np.testing.assert_allclose(found.cosines[n], state.task_cosines, atol=1e-5)
        np.testing.assert_allclose(found.losses[n], jax.tree.leaves(losses), rtol=1e-5)
    assert found.task_names == ("health", "rul")
    np.testing.assert_allclose(
        found.gradient_ratio, found.norms.max(axis=1) / found.norms.min(axis=1), rtol=1e-6
    )
    shares = found.norms / found.norms.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.share, shares.mean(axis=0), rtol=1e-5)


@pytest.mark.slow
def test_leaves_are_shared_as_the_gradients_tell(toy):
    losses_fn, params, batch = toy
    found = diagnose(losses_fn, params, [batch])
    assert found.paths == ("backbone.bias", "backbone.kernel", "health_head", "rul_head")
    assert found.shapes == ((8,), (4, 8), (8,), (8,))
    np.testing.assert_array_equal(found.shared, [True, True, False, False])
    np.testing.assert_array_equal(found.leaf_norms > 0, [[1, 1], [1, 1], [1, 0], [0, 1]])
    for shared, measure_on, measured in [
        (exclude("*_head"), None, [1, 1, 0, 0]),
        (None, only("kernel", "rul_head"), [0, 1, 0, 0]),
        (only("backbone", "rul_head"), only("rul_head"), [0, 0, 0, 1]),
    ]:
        other = diagnose(losses_fn, params, [batch], shared=shared, measure_on=measure_on)
        np.testing.assert_array_equal(other.measured, np.array(measured, bool))
        np.testing.assert_allclose(other.leaf_norms, found.leaf_norms, rtol=1e-6)
        norms = np.sqrt((found.leaf_norms[other.measured] ** 2).sum(axis=0))
        np.testing.assert_allclose(other.norms[0], norms, rtol=1e-5)


def test_a_leaf_that_shows_as_shared_later_counts_in_every_batch():
    def losses_fn(params, mask):
        return params["a"] @ jnp.array([3.0, 4.0]), (params["a"] + params["b"]) @ mask

    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    batches = [(jnp.zeros(2),), (jnp.ones(2),)]
    found = diagnose(losses_fn, params, batches)
    np.testing.assert_allclose(found.norms, [[5, 0], [5, np.sqrt(2)]], rtol=1e-6)
    np.testing.assert_array_equal(found.gradient_ratio[0], np.inf)


@pytest.mark.parametrize("num_batches", [1, 20])
def test_noise_of_gaussian_gradients(num_batches):
    """Gradients mu_i + sigma_i z of each example, in d dimensions: the noise is known."""
    dimensions, size = 4000, 24
    sigma = np.array([0.0, 0.05, 0.5])
    directions = np.random.default_rng(0).normal(size=(3, dimensions))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    def losses_fn(params, z):
        each = jnp.asarray(directions) + jnp.asarray(sigma)[:, None] * z.mean(axis=0)
        return each @ params

    # An odd batch leaves one example out.
    z = np.random.default_rng(1).normal(size=(num_batches, size + 1, dimensions))
    noise = diagnose(losses_fn, jnp.zeros(dimensions), [(each,) for each in z]).noise
    of_squares = sigma**2 * dimensions / size
    # The dot product of two noises has standard deviation 2 / sqrt(d) of the noise's square.
    tolerance = 3 * 2 / np.sqrt(dimensions * num_batches)
    np.testing.assert_allclose(noise, of_squares / (1 + of_squares), rtol=0, atol=tolerance)
    assert abs(noise[0]) < 1e-6


def test_noise_by_hand():
    """On 1, 3, 2, 6 the gradient of the mean is 3: halves 1.5 and 4.5."""

    def losses_fn(w, x):
        return w * x.mean(), w * x.sum(), w * 7.0

    noise = diagnose(losses_fn, jnp.zeros([]), [(jnp.array([1.0, 3.0, 2.0, 6.0]),)]).noise
    np.testing.assert_allclose(noise, [1 - 1.5 * 4.5 / 9, 1 - 1.5 * 4.5 / 9, 0], atol=1e-6)


@pytest.mark.parametrize("extra", [np.ones(3), np.ones((1, 4)), np.ones((4, 4))])
def test_batches_that_do_not_split_have_no_noise(extra):
    """Two leading axes; and a graph, half of whose rows do not fit half of the nodes."""

    def losses_fn(params, x, extra):
        mixed = extra @ x if extra.ndim == 2 else x
        return params @ x.mean(axis=0), 2 * params @ mixed.sum(axis=0)

    found = diagnose(losses_fn, jnp.zeros(2), [(jnp.ones((4, 2)), extra)])
    assert np.isnan(found.noise).all()
    assert "noise -: without a gradient, or of batches that do not split" in str(found)
    scalars = diagnose(losses_fn, jnp.zeros(2), [(jnp.ones((4, 2)), jnp.ones([]))])
    np.testing.assert_allclose(scalars.noise, 0, atol=1e-6)


def test_halves_draw_apart_and_aux_is_left_alone():
    def losses_fn(params, x, key):
        return [params @ jax.random.normal(key, (500,)), params @ jnp.ones(500) * x.mean()], "aux"

    batch = jnp.ones(4), jax.random.key(0)
    found = diagnose(losses_fn, jnp.zeros(500), [batch], has_aux=True)
    assert found.noise[0] > 0.8  # all of it is drawn anew
    assert abs(found.noise[1]) < 1e-5


def test_plain_weights_suffice():
    found = diagnose(*linear([3, 4], [0.0, 1.0]), ONES)
    assert found.recommendation == "plain weights suffice"
    assert len(found.reasons) == 1
    assert "5x apart" in found.reasons[0]


def test_two_tasks_to_balance():
    found = diagnose(*linear([0, 50], [0.0, 1.0]), ONES)
    assert found.recommendation == "balance the tasks"
    first, second = found.reasons
    assert "'0' pulls 50x harder than '1'" in first
    assert "gaba(2, " in first
    assert f"{50 * 0.05 / (50 / 51):.2f}x apart" in second  # (0.05, 50/51), divided by their sum
    just = diagnose(*linear([0, 19], [0.0, 1.0]), ONES)
    assert len(just.reasons) == 1  # the floor does not bind


def test_tasks_that_oppose_each_other():
    found = diagnose(*linear([0, 500], [0.3, -1.0]), ONES)
    assert found.recommendation == "balance the tasks, but expect conflict"
    assert found.conflicts == [("0", "1")]
    np.testing.assert_array_equal(found.conflict_rate, [[0, 1], [1, 0]])
    assert "median cosine -0.96, negative in 100 % of the batches" in found.reasons[-1]
    assert "weighting.upgrad" in found.reasons[-1]


@pytest.mark.parametrize(("ratio", "balance"), [(9.99, False), (10.0, True)])
def test_ten_times_is_where_balancing_begins(ratio, balance):
    found = diagnose(*linear([0, ratio], [0.0, 1.0]), ONES)
    assert found.recommendation == ("balance the tasks" if balance else "plain weights suffice")
    against = diagnose(*linear([1.0, ratio], [0.1, -1.0]), ONES)
    assert ("weighting.normalized(weighting.upgrad(2))" in against.reasons[-1]) == (ratio >= 10.1)


def test_what_gaba_cannot_do_for_three():
    found = diagnose(*linear([1, 0], [0.0, 1.0], [0.0, 0.001]), ONES)
    reason = found.reasons[1]
    assert "at most 1/(K-1) = 0.5" in reason
    assert "501x apart" in reason  # contributions (.25, .25, .0005)
    assert "weighting.inverse_norm" in reason
    assert "try balance(weighting.inverse_norm(3))" in found.reasons[0]
    bounded = diagnose(*linear([30, 0], [0.0, 20.0], [0.0, 2.0]), ONES)
    assert "try gaba(3, debias" in bounded.reasons[0]
    silent = diagnose(*linear([30, 0], [0.0, 20.0], [0.0, 0.0]), ONES, shared=only("w"))
    assert "try gaba(3, debias" in silent.reasons[0]
    assert "'2' had no gradient there" in silent.reasons[1]
    assert "at most 1/(K-1) = 0.5" in silent.reasons[2]
    assert "apart" not in silent.reasons[2]


def test_a_task_without_a_gradient():
    found = diagnose(*linear([1, 0], [0.0, 0.0]), ONES, shared=only("w"))
    assert found.recommendation == "balance the tasks"
    assert "'1' had no gradient there" in found.reasons[1]
    assert "median inf" in str(found)


def test_nothing_is_shared():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    found = diagnose(lambda p, x: (p["a"] @ x, p["b"] @ x), params, [(jnp.ones(2),)])
    assert found.recommendation == "nothing to balance: the tasks share no parameter"
    text = found.table(leaves=True)
    assert "shared: 0 of 2 leaves (0 of 4 parameters)" in text
    assert "no  1.41     0" in text


def test_noise_is_said_of_the_task_it_blurs():
    def losses_fn(params, x):
        return params @ jnp.ones(2), params @ x.mean(axis=0)

    x = np.random.default_rng(0).normal(size=(8, 10, 2))
    found = diagnose(losses_fn, jnp.zeros(2), [(each,) for each in x], task_names=["rul", "noisy"])
    assert "of 'noisy' is minibatch noise" in found.reasons[-1]


def test_batches_with_a_nan_are_left_out_and_a_broken_task_is_named(toy):
    losses_fn, params, (x, y) = toy
    broken = (x, y.at[0].set(jnp.nan))
    found, clean = (diagnose(losses_fn, params, b) for b in ([broken, (x, y)], [(x, y)]))
    assert found.nonfinite_count == 1
    assert "1 more left out" in str(found)
    np.testing.assert_allclose(found.norms, clean.norms, rtol=1e-6)
    with pytest.raises(ValueError, match=r"each of the 2 batches .*: of 'rul' on 'backbone.bias'"):
        diagnose(losses_fn, params, [broken, broken])


@pytest.mark.slow
@pytest.mark.parametrize("num_tasks", rest_slow([2, 10], fast=[10]))
def test_the_table_fits_80_columns(num_tasks):
    names = [f"a_task_with_quite_a_long_name_{i:02}" for i in range(num_tasks)]
    params = {f"block_{'x' * 50}_{i}": {"kernel": jnp.ones((3, 2, 100))} for i in range(2)}
    signs = np.resize([1.0, -1e-9], num_tasks)

    def losses_fn(params, x):
        total = sum(leaf.sum() for leaf in jax.tree.leaves(params))
        return [sign * x.mean() * total * 10**9 for sign in signs]

    found = diagnose(losses_fn, params, [(np.linspace(-1, 2, 8),)] * 3, task_names=names)
    lines = found.table(leaves=True).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("block_xxxx") for line in lines) % 2 == 0
    assert str(found) == found.table()
    assert "block" not in str(found)
    for i in range(num_tasks):  # every task has its column of cosines and of leaf norms
        shown = [line for line in lines if line.startswith(("cosine ", "leaf "))]
        assert sum(f"me_{i:02} " in f"{line} " for line in shown) == 2


def test_no_batch_is_compiled_for_by_itself():
    x = np.random.default_rng(0).normal(size=(10, 2))

    def traces(num_batches):
        count = []

        def losses_fn(params, x):
            count.append(None)
            return params @ x.mean(axis=0), params @ x.sum(axis=0)

        diagnose(losses_fn, jnp.zeros(2), [(x + i,) for i in range(num_batches)])
        return len(count)

    assert traces(6) == traces(1)


@pytest.mark.parametrize(
    ("losses_fn", "batches", "options", "message"),
    [
        (linear([1, 2], [2, 1])[0], [], {}, "batches is empty"),
        (linear([1, 2], [2, 1])[0], ONES[0], {}, r"batch 0 is of type .*Wrap it: \[\(batch,\)"),
        (linear([1, 2])[0], ONES, {}, "returned one loss"),
        (lambda params, x: params["w"].sum(), ONES, {}, "returned one scalar"),
        (linear([1, 2], [2, 1])[0], ONES, {"task_names": ["a"]}, "must be 2 different names"),
        (linear([1, 2], [2, 1])[0], ONES, {"task_names": "aa"}, "must be 2 different names"),
        (linear([1, 2], [2, 1])[0], ONES, {"shared": only("v")}, "'v' matches no parameter"),
    ],
)
def test_errors(losses_fn, batches, options, message):
    with pytest.raises(ValueError, match=message):
        diagnose(losses_fn, {"w": jnp.zeros(2)}, batches, **options)


@pytest.mark.slow
def test_the_turbofan_model_on_the_first_batches_of_its_run():
    config = TrainConfig(epochs=1, stride=20, weighting="uniform", optimizer="sgd", batch_size=64)
    data = load_data(config)
    first = train(data, config).records[0]
    found = diagnosis.diagnose_run(data, config, 2)
    np.testing.assert_allclose(found.norms[0], first.task_norms[0], rtol=1e-3)
    np.testing.assert_allclose(found.losses[0], first.losses[0], rtol=1e-4)
    assert not found.shared[[path.endswith("head.kernel") for path in found.paths]].any()
    with pytest.raises(ValueError, match="batches=1000 of batch_size=64 must be at least one each"):
        diagnosis.diagnose_run(data, config, 1000)


def test_integers_are_no_parameters():
    with pytest.raises(ValueError, match="params must be floating-point"):
        diagnose(lambda p, x: (p @ x, p @ x), jnp.zeros(2, int), ONES)


@pytest.mark.parametrize(
    ("gradients", "before"),
    [
        ([[0, 50], [0.0, 1.0]], "try "),
        ([[1, 0], [0.0, 1.0], [0.0, 0.001]], "try "),
        ([[3, 1], [-3.0, 0.0]], "such as "),
        ([[30, 1], [-1.0, 0.0]], "such as "),
    ],
)
def test_the_optimizer_it_recommends_is_there(gradients, before):
    """The call in the recommendation, as it is printed."""
    found = diagnose(*linear(*gradients), ONES)
    (reason,) = (reason for reason in found.reasons if before in reason)
    call = re.split(r"\.$|, or", reason.split(before)[1])[0]
    tx = eval(call, vars(gaba_jax))
    assert isinstance(tx, optax.GradientTransformation)
