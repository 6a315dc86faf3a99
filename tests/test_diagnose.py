"""diagnose: what it measures, what it says of it, and that it fits the page."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaba_jax
from gaba_jax import Diagnosis, balance, diagnose, exclude, only, weighting
from gaba_jax.turbofan import diagnosis
from gaba_jax.turbofan.train import TrainConfig, load_data, train
from tests.slow import rest_slow


def linear(*directions):
    """Losses ``w @ direction`` on a shared w, whose gradients are the directions themselves."""
    rows = jnp.array(directions, jnp.float32)
    return (lambda params, x: list(rows @ params["w"] * jnp.mean(x))), {"w": jnp.zeros(2)}


def made(norms, cosines):
    """A diagnosis of measurements [N, K] and [N, K, K] on one shared leaf."""
    norms = np.array(norms, np.float32)
    return Diagnosis(
        task_names=tuple("abcd"[: norms.shape[1]]),
        losses=norms,
        norms=norms,
        cosines=np.array(cosines, np.float32),
        noise=np.zeros(norms.shape[1]),
        paths=("w",),
        shapes=((2,),),
        shared=np.ones(1, bool),
        measured=np.ones(1, bool),
        leaf_norms=norms[:1],
        nonfinite_count=0,
    )


def with_cosines(*cosines, loud=2.0):
    """Two tasks, with one of these cosines in each batch."""
    return made([[1.0, loud]] * len(cosines), [[[1, c], [c, 1]] for c in cosines])


ONES = [(jnp.ones(4),)]
UNIFORM = "uniform weights: train on the sum of the losses, nothing to add"


def balance_with(rule):
    return f"balance with optax.chain({rule}, optax.adamw(1e-3))"


def joined(found):
    return " ".join(str(found).split())


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


@pytest.mark.parametrize(
    ("ratio", "choice"), [(5.0, UNIFORM), (9.99, UNIFORM), (10.0, balance_with("equalize(2)"))]
)
def test_ten_times_is_where_balancing_begins(ratio, choice):
    found = diagnose(*linear([0, ratio], [0.0, 1.0]), ONES)
    assert found.recommendation == choice
    (why,) = found.reasons
    assert (f"'0' pulls {ratio:.3g}x harder than '1'" in why) == (choice != UNIFORM)
    assert (f"{ratio:.3g}x apart" in why) == (choice == UNIFORM)
    assert f"Recommendation: {choice} Why: {why}" in joined(found)
    assert str(found).count("\nWhy: ") == 1


def test_the_choice_for_three_names_the_loudest_and_the_quietest():
    found = made([[1, 20, 0.5]], [np.eye(3)])
    assert found.recommendation == balance_with("equalize(3)")
    assert "'b' pulls 40x harder than 'c'" in found.reasons[0]


@pytest.mark.parametrize(
    ("loud", "rule", "why"),
    [
        (1.2, "balance(weighting.upgrad(2))", "weights by norms do not change that"),
        (50.0, "balance(weighting.normalized(weighting.upgrad(2)))", "'b' pulls 50x harder"),
    ],
)
def test_conflict_changes_the_choice_where_it_is_certain(loud, rule, why):
    found = with_cosines(-0.5, -0.4, -0.6, -0.5, -0.55, loud=loud)
    assert found.conflicts == [("a", "b")]
    assert found.recommendation == balance_with(rule)
    (reason,) = found.reasons
    assert reason.startswith("'a' and 'b' pull against each other, ")
    assert why in reason
    np.testing.assert_array_equal(found.conflict_rate, [[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("cosines", "verdict"),
    [
        ((-0.9, -0.9, -0.9, -0.9), "conflict: not enough batches to tell, 5 at least"),
        ((-0.9,), "conflict: not enough batches to tell, 5 at least"),
        # Mean -.2, s = .1 sqrt(2.5), t = 2.776: half the width is .196.
        (
            (-0.4, -0.3, -0.2, -0.1, 0.0),
            "conflict, cosine < -0.1: not certain; 'a' and 'b' -0.20, 95 % interval -0.40 to -0.00",
        ),
        (
            (-0.03, -0.08, -0.06, -0.05, -0.06),
            "conflict, cosine < -0.1: none; 'a' and 'b' -0.06, 95 % interval -0.08 to -0.03",
        ),
        (
            (-0.99, -0.99, -0.99, -0.99, -0.91),
            "conflict, cosine < -0.1: yes; 'a' and 'b' -0.97, 95 % interval -1.00 to -0.93",
        ),
    ],
)
def test_what_the_interval_says_of_conflict(cosines, verdict):
    found = with_cosines(*cosines)
    assert verdict in joined(found)
    assert (found.recommendation == UNIFORM) == (" yes" not in verdict)


@pytest.mark.parametrize(
    ("count", "quantile"), [(5, 2.77645), (6, 2.57058), (10, 2.26216), (31, 2.04227)]
)
def test_the_interval_is_that_of_student(count, quantile):
    """The quantiles are scipy's."""
    made = np.linspace(-0.3, 0.3, count)
    low, high = with_cosines(*made).cosine_interval[:, 0, 1]
    half = quantile * made.std(ddof=1) / np.sqrt(count)
    np.testing.assert_allclose([low, high], [-half, half], rtol=1e-3)


def test_of_three_the_pairs_that_conflict():
    cosines = [[1, -0.9, 0.5], [-0.9, 1, -0.6], [0.5, -0.6, 1]]
    found = made([[1, 2, 3]] * 5, [cosines] * 5)
    assert found.conflicts == [("a", "b"), ("b", "c")]
    assert "yes; 'a' and 'b' -0.90, 95 % interval -0.90 to -0.90; 1 more" in joined(found)
    assert found.recommendation == balance_with("balance(weighting.upgrad(3))")


def test_a_task_without_a_gradient():
    found = diagnose(*linear([1, 0], [0.0, 0.0]), ONES, shared=only("w"))
    assert found.recommendation == UNIFORM
    (why,) = found.reasons
    assert why.startswith("'1' had no gradient on what they share")
    assert "median inf" in str(found)
    three = made([[30, 2, 0]], [np.eye(3)])
    assert three.recommendation == balance_with("equalize(3)")
    assert "'a' pulls 15x harder than 'b'" in three.reasons[0]
    assert "'c' had no gradient" in three.reasons[1]


def test_tasks_that_take_turns_are_compared_where_they_have_a_gradient():
    found = made([[30, 0], [0, 1]] * 3, [np.eye(2)] * 6)
    assert found.recommendation == balance_with("equalize(2)")
    assert "'a' pulls 30x harder than 'b'" in found.reasons[0]
    assert "'a', 'b' had no gradient" in found.reasons[1]


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


@pytest.mark.slow
def test_batches_with_a_nan_are_left_out_and_a_broken_task_is_named(toy):
    losses_fn, params, (x, y) = toy
    broken = (x, y.at[0].set(jnp.nan))
    found, clean = (diagnose(losses_fn, params, b) for b in ([broken, (x, y)], [(x, y)]))
    assert found.nonfinite_count == 1
    assert "1 more left out" in str(found)
    np.testing.assert_allclose(found.norms, clean.norms, rtol=1e-6)
    with pytest.raises(ValueError, match=r"each of the 2 batches .*: of 'rul' on 'backbone.bias'"):
        diagnose(losses_fn, params, [broken, broken])


def test_the_table_fits_the_terminal():
    norms = [[100.0, 1.0, 3.0, 4.0]] * 5
    found = made(norms, np.broadcast_to(np.eye(4), (5, 4, 4)))
    found = found._replace(
        task_names=tuple(f"a_long_name_of_task_{i}" for i in range(4)),
        paths=("a_path_of_many_segments.with_a_kernel.in_the_end",),
        nonfinite_count=2,
    )
    for width in (40, 60, 72, 80, 100):
        lines = found.table(leaves=True, width=width).splitlines()
        assert max(map(len, lines)) <= max(width, 60)
    assert found.table(width=80) == found.table()
    narrow = [line for line in found.table(leaves=True, width=60).splitlines() if "_path" in line]
    assert narrow[0].split()[0].startswith("a_path_")
    assert len(narrow[0].split()[0]) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("num_tasks", rest_slow([2, 10], fast=[10]))
def test_the_table_fits_80_columns(num_tasks):
    names = [f"a_task_with_quite_a_long_name_{i:02}" for i in range(num_tasks)]
    params = {f"block_{'x' * 50}_{i}": {"kernel": jnp.ones((3, 2, 100))} for i in range(2)}
    signs = np.resize([1.0, -1e-9], num_tasks)

    def losses_fn(params, x):
        total = sum(leaf.sum() for leaf in jax.tree.leaves(params))
        return [sign * x.mean() * total * 10**9 for sign in signs]

    found = diagnose(losses_fn, params, [(np.linspace(-1, 2, 8),)] * 5, task_names=names)
    lines = found.table(leaves=True).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("block_xxxx") for line in lines) % 2 == 0
    assert str(found) == found.table()
    assert "block" not in str(found)
    for i in range(num_tasks):  # every task has its column of cosines and of leaf norms
        shown = [line for line in lines if line.startswith(("mean cosine ", "leaf "))]
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


@pytest.mark.parametrize(("loud", "cosine"), [(50, 0.5), (1.5, -0.9), (50, -0.9)])
def test_the_optimizer_it_recommends_is_there(loud, cosine):
    """The call in the recommendation, as it is printed."""
    found = with_cosines(*[cosine] * 5, loud=loud)
    call = found.recommendation.removeprefix("balance with ")
    tx = eval(call, {**vars(gaba_jax), "optax": optax})
    assert isinstance(tx, optax.GradientTransformation)
