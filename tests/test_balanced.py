"""balanced_value_and_grad: the same weights and gradients as stacked, at the cost of neither."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from gaba_jax import balance, balanced_value_and_grad, exclude, task_value_and_grad, weighting
from gaba_jax._state import hold, is_due
from tests.slow import rest_slow, rest_slow_of_several

K = 3
RANDOM = np.random.default_rng(0)
PARAMS = {
    "trunk": {
        "kernel": jnp.asarray(RANDOM.normal(size=(4, 24)), jnp.float32),
        "bias": jnp.zeros(24),
    },
    **{f"head_{i}": jnp.asarray(RANDOM.normal(size=24), jnp.float32) / 5 for i in range(K)},
}
X = jnp.asarray(RANDOM.normal(size=(12, 4)), jnp.float32)
Y = jnp.asarray(RANDOM.normal(size=(12, K)), jnp.float32)
SCALES = jnp.array([300.0, 1.0, 0.05])


def encoder(params, x, *_):
    return jnp.tanh(x @ params["trunk"]["kernel"] + params["trunk"]["bias"])


def heads_fn(params, h, x, y, scales):
    return tuple(scales[i] * jnp.mean((h @ params[f"head_{i}"] - y[:, i]) ** 2) for i in range(K))


def losses_fn(params, x, y, scales):
    return heads_fn(params, encoder(params, x), x, y, scales)


BATCH = (X, Y, SCALES)
stacked_grads = task_value_and_grad(losses_fn)


def closed_over_scales(params, x, y):
    return losses_fn(params, x, y, SCALES)


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def weighted_sum(weights, stacked):
    return jax.tree.map(lambda g: jnp.tensordot(jnp.asarray(weights, g.dtype), g, 1), stacked)


def assert_close(actual, expected, rtol=1e-5):
    """Equal to ``rtol`` of the largest element of each leaf, or to rounding of the whole tree's."""
    largest = [float(jnp.abs(e).max(initial=0)) for e in jax.tree.leaves(expected)]
    for a, e, size in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), largest, strict=True):
        atol = max(rtol * size, 1e-7 * max(largest))
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol)


# Schedules: everything that may happen to the measurements of a run.
STEPS = 10


@st.composite
def schedules(draw):
    def per_step(values, *shape):
        size = int(np.prod((STEPS, *shape)))
        drawn = draw(st.lists(values, min_size=size, max_size=size))
        return np.array(drawn).reshape(STEPS, *shape)

    present = per_step(st.sampled_from([True, True, True, False]), K)
    bad = per_step(st.sampled_from([False] * 9 + [True]), K) & present
    scales = 10 ** per_step(st.floats(-3, 3), K)
    return dict(
        present=jnp.asarray(present),
        scales=jnp.asarray(np.where(bad, draw(st.sampled_from([np.nan, np.inf])), scales), "f4"),
        beta=jnp.asarray(per_step(st.sampled_from([0.0, 0.5, 0.9, 0.99])), "f4"),
        warmup_steps=jnp.int32(draw(st.integers(0, 4))),
        min_weight=jnp.float32(draw(st.sampled_from([0.0, 0.05, 0.3]))),
    )


@functools.cache
def driver(name, every, debias, floor):
    """``schedule -> (states after each step, gradients)`` over constant parameters."""

    def make(now):
        return weighting.gaba(
            K,
            beta=now["beta"],
            warmup_steps=now["warmup_steps"],
            min_weight=now["min_weight"],
            debias=debias,
            floor=floor,
        )

    def stacked_step(rule, state, now):
        _, grads = stacked_grads(PARAMS, X, Y, now["scales"])
        measured = balance(rule).update(grads, state, PARAMS, task_mask=now["present"])[1]
        held = hold(rule, state, now["present"])
        state = jax.tree.map(lambda a, b: jnp.where(is_due(state, every), a, b), measured, held)
        return state, weighted_sum(state.task_weights, grads)

    def step(schedule, state, now):
        rule = make(now | {k: schedule[k] for k in ("warmup_steps", "min_weight")})
        if name == "stacked":
            state, grads = stacked_step(rule, state, now)
        else:
            balanced = balanced_value_and_grad(losses_fn, rule, every=every, measure=name)
            (_, grads), state = balanced.value_and_grad(
                PARAMS, state, X, Y, now["scales"], task_mask=now["present"]
            )
        return state, (state, grads)

    @jax.jit
    def run(schedule):
        series = {k: schedule[k] for k in ("present", "scales", "beta")}
        first = make({"beta": 0.9, "warmup_steps": 0, "min_weight": 0.05})
        start = balanced_value_and_grad(losses_fn, first).init(PARAMS)
        return jax.lax.scan(functools.partial(step, schedule), start, series)[1]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "static",
    rest_slow(
        [(1, False, "renormalize"), (3, False, "project"), (3, True, "renormalize")],
        fast=[(3, True, "renormalize")],
    ),
)
@given(schedule=schedules())
def test_stacked_exact_and_lagged_agree(schedule, static):
    """The same state on any schedule; lagged applies what the others will have applied before."""
    every, debias, floor = static
    states, grads = driver("stacked", every, debias, floor)(schedule)
    chex.assert_tree_all_finite(states)
    for name in ("exact", "lagged"):
        other, other_grads = driver(name, every, debias, floor)(schedule)
        if name == "lagged":
            before = np.concatenate([np.full((1, K), 1 / K), states.next_task_weights[:-1]])
            for t, present in enumerate(np.asarray(schedule["present"])):
                if present.all():
                    # Published weights are differences from a sum: small ones have its rounding.
                    np.testing.assert_allclose(
                        other.task_weights[t], before[t], rtol=1e-5, atol=1e-7
                    )
            states = states._replace(task_weights=other.task_weights)
        else:
            finite = np.isfinite(np.where(schedule["present"], schedule["scales"], 0)).all(axis=1)
            assert_close(at(other_grads, finite), at(grads, finite))
        chex.assert_trees_all_close(other, states, rtol=2e-5, atol=1e-7)


def training(value_and_grad, state, params=PARAMS, steps=200):
    """Parameters, last state and the weights of each step."""
    tx = optax.adam(1e-2)

    def step(carry, key):
        params, state, opt_state = carry
        x = jax.random.normal(key, X.shape)
        grads, state = value_and_grad(params, state, x, x[:, :K])
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), state.next_task_weights

    def run():
        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (params, state, tx.init(params)), keys)

    (params, state, _), weights = jax.jit(run)()
    return params, state, weights


def stacked_training(rule, **options):
    tx = balance(rule, **options)

    def value_and_grad(params, state, *batch):
        grads = task_value_and_grad(closed_over_scales)(params, *batch)[1]
        return tx.update(grads, state, params)

    return training(value_and_grad, tx.init(PARAMS))


def balanced_training(fn, rule, **options):
    balanced = balanced_value_and_grad(fn, rule, **options)

    def value_and_grad(*args):
        (_, grads), state = balanced.value_and_grad(*args)
        return grads, state

    return training(value_and_grad, balanced.init(PARAMS))


GABA = weighting.gaba(K, beta=0.9, warmup_steps=20)
HEADS = {"shared": exclude("head_*"), "weight_task_specific": False}


OF_BIAS = {"measure_on": exclude("bias")}
COMBINED = [{}, {"microbatch_size": 4}]
EACH_ONCE = [({}, OF_BIAS)]


@pytest.mark.parametrize(
    ("options", "selection"),
    rest_slow_of_several(itertools.product(COMBINED, [{}, HEADS, OF_BIAS]), fast=EACH_ONCE),
)
def test_200_steps_of_training_are_those_of_balance(options, selection):
    expected = stacked_training(GABA, **selection)
    actual = balanced_training(closed_over_scales, GABA, **options, **selection)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


class TestLagged:
    @pytest.mark.parametrize("selection", [{}, HEADS])
    def test_sums_with_the_weights_of_the_update_before(self, selection):
        rule = weighting.inverse_norm(K)._replace(initial_weights=jnp.array([0.2, 0.3, 0.5]))
        balanced = balanced_value_and_grad(losses_fn, rule, measure="lagged", **selection)
        state, step = balanced.init(PARAMS), jax.jit(balanced.value_and_grad)
        _, stacked = stacked_grads(PARAMS, *BATCH)
        expected = np.array([0.2, 0.3, 0.5])
        for _ in range(3):
            (_, grads), state = step(PARAMS, state, *BATCH)
            np.testing.assert_allclose(state.task_weights, expected, rtol=1e-6)
            summed = weighted_sum(expected, stacked)
            if selection:
                summed |= {f"head_{i}": stacked[f"head_{i}"][i] for i in range(K)}
            assert_close(grads, summed)
            expected = state.next_task_weights
        assert expected[0] < 0.01


BAD = [(jnp.nan, {}), (jnp.inf, {}), (jnp.nan, HEADS), (jnp.inf, HEADS)]


@pytest.mark.parametrize("measure", ["exact", "lagged"])
class TestTasksApart:
    @pytest.mark.parametrize(
        ("bad", "selection"), rest_slow_of_several(BAD, fast=[(jnp.nan, {}), (jnp.inf, HEADS)])
    )
    def test_drops_like_balance(self, measure, bad, selection):
        balanced = balanced_value_and_grad(
            losses_fn, GABA, measure=measure, nonfinite="drop", **selection
        )
        tx = balance(weighting.uniform(K), nonfinite="drop", **selection)
        scales = SCALES.at[1].set(bad)
        (_, grads), state = jax.jit(balanced.value_and_grad)(
            PARAMS, balanced.init(PARAMS), X, Y, scales
        )
        expected, _ = tx.update(stacked_grads(PARAMS, X, Y, scales)[1], tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(state.task_weights, [0.5, 0, 0.5])
        assert state.nonfinite_count == 1
        assert_close(grads, expected)

    def test_drops_in_held_updates_too(self, measure):
        balanced = balanced_value_and_grad(
            losses_fn, weighting.inverse_norm(K), measure=measure, nonfinite="drop", every=2
        )
        state, step = balanced.init(PARAMS), jax.jit(balanced.value_and_grad)
        _, state = step(PARAMS, state, *BATCH)
        scales = SCALES.at[1].set(jnp.nan)
        (_, grads), held = step(PARAMS, state, X, Y, scales)
        rest = np.where([True, False, True], state.next_task_weights, 0)
        weights = rest / rest.sum()
        np.testing.assert_allclose(held.task_weights, weights, rtol=1e-6)
        assert held.since_measured == 2
        stacked = stacked_grads(PARAMS, *BATCH)[1]
        assert_close(grads, weighted_sum(weights, stacked))

    def test_an_absent_task_is_never_read(self, measure):
        balanced = balanced_value_and_grad(losses_fn, GABA, measure=measure)
        mask = jnp.array([True, False, True])
        step, start = jax.jit(balanced.value_and_grad), balanced.init(PARAMS)
        expected = step(PARAMS, start, *BATCH, task_mask=mask)
        (losses, grads), state = step(
            PARAMS, start, X, Y, SCALES.at[1].set(jnp.nan), task_mask=mask
        )
        assert jnp.isnan(losses[1])
        assert_close((grads, state), (expected[0][1], expected[1]))


class TestEncoder:
    def test_norms_are_those_on_the_features(self):
        rule = weighting.inverse_norm(K)
        balanced = balanced_value_and_grad(heads_fn, rule, encoder=encoder)
        (losses, grads), state = jax.jit(balanced.value_and_grad)(
            PARAMS, balanced.init(PARAMS), *BATCH
        )
        features = encoder(PARAMS, X)
        on_features = task_value_and_grad(lambda h: heads_fn(PARAMS, h, *BATCH))(features)[1]
        norms = jnp.sqrt(jnp.sum(on_features**2, axis=(1, 2)))
        np.testing.assert_allclose(state.task_norms, norms, rtol=1e-5)
        np.testing.assert_allclose(state.task_weights, (1 / norms) / (1 / norms).sum(), rtol=1e-5)
        expected, stacked = stacked_grads(PARAMS, *BATCH)
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
        assert_close(grads, weighted_sum(state.task_weights, stacked))

    def test_plain_heads(self):
        balanced = balanced_value_and_grad(heads_fn, GABA, encoder=encoder, **HEADS)
        (_, grads), state = balanced.value_and_grad(PARAMS, balanced.init(PARAMS), *BATCH)
        stacked = stacked_grads(PARAMS, *BATCH)[1]
        assert_close(grads["head_1"], stacked["head_1"][1])
        kernel = jnp.tensordot(state.task_weights, stacked["trunk"]["kernel"], 1)
        assert_close(grads["trunk"]["kernel"], kernel)

    def test_features_of_integers(self):
        balanced = balanced_value_and_grad(
            heads_fn,
            GABA,
            encoder=lambda p, *batch: {"h": encoder(p, *batch), "ids": jnp.arange(3)},
        )
        with pytest.raises(ValueError, match=r"features must be floating.*'ids'.*int32"):
            balanced.value_and_grad(PARAMS, balanced.init(PARAMS), *BATCH)
        nothing = balanced_value_and_grad(heads_fn, GABA, encoder=lambda p, *batch: ())
        with pytest.raises(ValueError, match="encoder returned no features"):
            nothing.value_and_grad(PARAMS, nothing.init(PARAMS), *BATCH)


class TestMicrobatches:
    @pytest.mark.parametrize(
        "options",
        rest_slow(
            [{}, {"measure": "lagged"}, {"encoder": encoder}, {"every": 2}, HEADS],
            fast=[{}, {"encoder": encoder}],
        ),
    )
    def test_are_the_full_batch(self, options):
        fn = heads_fn if "encoder" in options else losses_fn
        fn = functools.partial(fn, scales=SCALES)
        results = []
        for size in (None, 3):
            balanced = balanced_value_and_grad(fn, GABA, microbatch_size=size, **options)
            step, state = jax.jit(balanced.value_and_grad), balanced.init(PARAMS)
            for _ in range(2):
                out, state = step(PARAMS, state, X, Y)
            results.append((out, state))
        assert_close(*results)

    def test_memory_is_that_of_a_part(self):
        params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}

        def fn(params, x):
            h = x
            for _ in range(8):
                h = jnp.tanh(h @ params["a"]) + jnp.tanh(h @ params["b"])
            return jnp.mean(h), jnp.mean(h**2)

        def temp(size):
            balanced = balanced_value_and_grad(fn, weighting.inverse_norm(2), microbatch_size=size)
            step = jax.jit(balanced.value_and_grad)
            args = params, balanced.init(params), jnp.ones((4096, 64))
            return step.lower(*args).compile().memory_analysis().temp_size_in_bytes

        # The batch itself is laid out anew, 1 MiB; its activations took 26.
        assert temp(64) < 0.15 * temp(None)

    @pytest.mark.slow
    def test_every_part_has_its_own_random_key(self):
        def fn(params, x, key):
            noise = jax.random.normal(key, x.shape)
            return jnp.mean(params * noise), jnp.mean(params * x)

        balanced = balanced_value_and_grad(fn, GABA2, microbatch_size=2, has_aux=False)
        params, key = jnp.ones(3), jax.random.key(1)
        (losses, _), _ = balanced.value_and_grad(
            params, balanced.init(params), jnp.ones((4, 3)), key
        )
        noise = [jax.random.normal(jax.random.fold_in(key, m), (2, 3)).mean() for m in range(2)]
        np.testing.assert_allclose(losses[0], np.mean(noise), rtol=1e-6)

    @pytest.mark.parametrize("args", [(X[:5], Y[:5]), (X, Y[:6]), ()])
    def test_a_batch_that_does_not_split(self, args):
        fn = functools.partial(losses_fn, scales=SCALES)
        balanced = balanced_value_and_grad(fn, GABA, microbatch_size=3)
        with pytest.raises(ValueError, match=r"microbatch_size=3 must divide the leading axis"):
            balanced.value_and_grad(PARAMS, balanced.init(PARAMS), *args)


GABA2 = weighting.gaba(2, beta=0.5, warmup_steps=0)


class TestEvery:
    @pytest.mark.parametrize("measure", ["exact", "lagged"])
    def test_holds_in_between_and_tries_again_after_a_rejection(self, measure):
        balanced = balanced_value_and_grad(
            losses_fn, weighting.inverse_norm(K), every=3, measure=measure
        )
        state, step = balanced.init(PARAMS), jax.jit(balanced.value_and_grad)
        since, weights = [], []
        for t in range(9):
            bad = t in (0, 4)  # 4 is where the second measurement is due
            scales = SCALES * (t + 1.0) ** jnp.arange(K) * (jnp.nan if bad else 1)
            _, state = step(PARAMS, state, X, Y, scales)
            since.append(int(state.since_measured))
            weights.append(np.asarray(state.next_task_weights))
        assert since == [0, 1, 2, 3, 3, 1, 2, 3, 1]
        assert state.nonfinite_count == 2
        changed = [t for t in range(1, 9) if (weights[t] != weights[t - 1]).any()]
        assert changed == [1, 5, 8]

    def test_the_weighting_is_told_how_long_ago(self):
        def update(stats, state):
            return stats.elapsed * jnp.ones(K), state

        rule = weighting.uniform(K)._replace(update=update)
        balanced = balanced_value_and_grad(losses_fn, rule, every=4)
        state, step = balanced.init(PARAMS), jax.jit(balanced.value_and_grad)
        elapsed = []
        for _ in range(9):
            _, state = step(PARAMS, state, *BATCH)
            elapsed.append(int(state.task_weights[0]))
        assert elapsed == [1, 1, 1, 1, 4, 4, 4, 4, 4]

    def test_a_decay_per_measurement_in_a_decay_per_update(self):
        """The documented conversion, against the average of a code that keeps 0.9 each time."""
        n, kept, weight = 3, 0.9, 1.0
        rule = weighting.inverse_dirichlet(2, beta=kept ** (1 / n))

        def losses_fn(params, size):
            return params[0] - params[1], size * (params[0] - params[1])

        balanced = balanced_value_and_grad(losses_fn, rule, every=n)
        state, step = balanced.init(jnp.ones(2)), jax.jit(balanced.value_and_grad)
        _, state = step(jnp.ones(2), state, 1.0)  # a ratio of 1, from which the average starts
        for t in range(1, 10):
            size = 1 / (1.0 + t)
            _, state = step(jnp.ones(2), state, size)
            if t % n == 0:
                weight = kept * weight + (1 - kept) / size
            np.testing.assert_allclose(state.task_weights, [1, weight], rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"measure": "lagged"}])
@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e10, 1e25])
def test_norms_at_any_scale(scale, options):
    rule = weighting.inverse_norm(K)
    balanced = balanced_value_and_grad(losses_fn, rule, shared=exclude("head_*"), **options)
    step = jax.jit(balanced.value_and_grad)
    _, expected = step(PARAMS, balanced.init(PARAMS), *BATCH)
    _, state = step(PARAMS, balanced.init(PARAMS), X, Y, SCALES * jnp.array([scale, 1, 1]))
    np.testing.assert_allclose(
        state.task_norms, expected.task_norms * np.array([scale, 1, 1]), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "bound"),
    rest_slow_of_several(
        [({}, 1.7), ({"every": 10}, 1.7), ({"measure": "lagged"}, 2.1)],
        fast=[({}, 1.7), ({"measure": "lagged"}, 2.1)],
    ),
)
def test_memory_of_one_gradient(options, bound):
    """Eight tasks, and XLA allocates little more than for a step with fixed weights."""
    keys = jax.random.split(jax.random.key(0), 9)
    params = {"trunk": [jnp.ones((512, 512)) for _ in range(3)]}
    params["heads"] = [jax.random.normal(key, (512,)) for key in keys]

    def fn(params, x):
        for kernel in params["trunk"]:
            x = jnp.tanh(x @ kernel)
        return [jnp.mean((x @ head) ** 2) for head in params["heads"][:8]]

    adamw = optax.adamw(1e-3)

    def temp(value_and_grad, *args):
        def step(params, opt_state, *args):
            updates, opt_state = adamw.update(value_and_grad(params, *args), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, adamw.init(params), *args)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    x = jnp.ones((32, 512))
    plain = temp(jax.grad(lambda p, x: sum(fn(p, x))), x)

    def balanced(**options):
        made = balanced_value_and_grad(fn, weighting.gaba(8), **options)
        return temp(lambda *args: made.value_and_grad(*args)[0][1], made.init(params), x)

    assert balanced(**options) < bound * plain


class TestModels:
    """What losses_fn may hold; each equal to the stacked path."""

    def check(self, fn, params, *batch, has_aux=False, rtol=1e-5, options=()):
        rule = weighting.inverse_norm(2)
        values, stacked = jax.jit(task_value_and_grad(fn, has_aux=has_aux))(params, *batch)
        tx = balance(rule)
        expected, state = tx.update(stacked, tx.init(params), params)
        for option in ({}, {"measure": "lagged"}, *options):
            balanced = balanced_value_and_grad(fn, rule, has_aux=has_aux, **option)
            (out, grads), new = jax.jit(balanced.value_and_grad)(
                params, balanced.init(params), *batch
            )
            chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
            assert_close(out, values, rtol)
            assert_close(new.task_norms, state.task_norms, rtol)
            assert_close(new.next_task_weights, state.next_task_weights, rtol)
            if "measure" not in option:
                assert_close(grads, expected, rtol)
        return out

    @pytest.mark.slow
    def test_dropout_and_batch_norm(self):
        class Model(nnx.Module):
            def __init__(self, rngs):
                self.dense = nnx.Linear(4, 64, rngs=rngs)
                self.norm = nnx.BatchNorm(64, rngs=rngs)
                self.dropout = nnx.Dropout(0.5)
                self.heads = nnx.Linear(64, 2, rngs=rngs)

            def __call__(self, x, rngs):
                h = self.dropout(nnx.relu(self.norm(self.dense(x))), rngs=rngs)
                return self.heads(h)

        graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

        def fn(params, x, key):
            model = nnx.merge(graph, params, rest, copy=True)
            out = model(x, nnx.Rngs(key))
            _, _, new = nnx.split(model, nnx.Param, ...)
            return (100 * jnp.mean(out[:, 0] ** 2), jnp.mean((out[:, 1] - 1) ** 2)), new

        _, new = self.check(fn, params, X, jax.random.key(3), has_aux=True)
        mean = jax.tree.leaves(new["norm"]["mean"])[0]
        dense = nnx.merge(graph, params, rest, copy=True).dense(X)
        np.testing.assert_allclose(mean, 0.01 * dense.mean(axis=0), rtol=1e-5)  # moved once

    @pytest.mark.slow
    def test_recurrent(self):
        rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 16, rngs=nnx.Rngs(0)))
        graph, params, rest = nnx.split(rnn, nnx.Param, ...)

        def fn(params, x):
            last = nnx.merge(graph, params, rest, copy=True)(x)[:, -1]
            return 50 * jnp.mean(last**2), jnp.mean((last - 1) ** 2)

        self.check(fn, params, jnp.asarray(RANDOM.normal(size=(6, 9, 4)), jnp.float32))

    @pytest.mark.slow
    @pytest.mark.parametrize("wrap", rest_slow([jax.checkpoint, jax.jit], fast=[jax.checkpoint]))
    def test_attention_in_checkpoint_and_jit(self, wrap):
        attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(attention, nnx.Param, ...)

        @wrap
        def layer(params, x):
            return nnx.merge(graph, params, rest, copy=True)(x)

        def fn(params, x):
            out = layer(params, layer(params, x))
            return 50 * jnp.mean(out**2), jnp.mean((out - 1) ** 2)

        self.check(fn, params, jnp.asarray(RANDOM.normal(size=(3, 5, 32)), jnp.float32))

    def test_convolution_as_unfold_and_dense(self):
        params = {"kernel": jnp.asarray(RANDOM.normal(size=(20, 64)), jnp.float32)}
        params["head"] = jnp.asarray(RANDOM.normal(size=(64, 2)), jnp.float32)

        def fn(params, x):
            windows = jnp.stack([x[:, i : i + 5] for i in range(4)], axis=1)  # [B, 4, 5, 4]
            h = nnx.relu(jnp.reshape(windows, (*windows.shape[:2], 20)) @ params["kernel"])
            out = h.mean(axis=1) @ params["head"]
            return 50 * jnp.mean(out[:, 0] ** 2), jnp.mean((out[:, 1] - 1) ** 2)

        self.check(fn, params, jnp.asarray(RANDOM.normal(size=(2, 8, 4)), jnp.float32))

    @pytest.mark.slow
    def test_low_precision(self):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
        x = X.astype(jnp.bfloat16)

        def fn(params, x):
            h = encoder(params, x)
            return [100 * jnp.mean((h @ params["head_0"]) ** 2), jnp.mean(h @ params["head_1"])]

        self.check(fn, params, x, rtol=0.03)

    def test_custom_vjp_and_a_stack_of_losses(self):
        @jax.custom_vjp
        def double(x):
            return 2 * x

        double.defvjp(lambda x: (2 * x, None), lambda _, g: (3 * g,))

        def fn(params, x):
            h = double(x @ params)
            return jnp.stack([jnp.mean(h**2), 0.01 * jnp.mean(jnp.sin(h))])

        self.check(fn, PARAMS["trunk"]["kernel"], X)


@pytest.mark.slow
@pytest.mark.parametrize("needs", [{"cosines"}, {"losses"}, {"norms", "cosines", "losses"}])
@pytest.mark.parametrize("measure", rest_slow(["exact", "lagged"], fast=["exact"]))
def test_whatever_the_weighting_needs(needs, measure):
    """Rules see the same numbers, whichever path they come by."""

    def update(stats, state):
        assert (stats.cosines is not None) == ("cosines" in needs)
        ones = jnp.ones(K)
        numbers = jnp.stack([ones if x is None else x for x in (stats.norms, stats.losses)])
        if stats.cosines is not None:
            numbers = jnp.concatenate([numbers, stats.cosines])
        return jax.nn.softmax(numbers.sum(axis=0) / 100), numbers

    rows = 5 if "cosines" in needs else 2
    rule = weighting.uniform(K)._replace(
        needs=frozenset(needs), update=update, init=lambda: jnp.zeros((rows, K))
    )
    tx = balance(rule)
    losses, stacked = stacked_grads(PARAMS, *BATCH)
    _, expected = tx.update(stacked, tx.init(PARAMS), PARAMS, task_losses=losses)
    balanced = balanced_value_and_grad(losses_fn, rule, measure=measure)
    (_, grads), state = jax.jit(balanced.value_and_grad)(PARAMS, balanced.init(PARAMS), *BATCH)
    if measure == "lagged":
        expected = expected._replace(task_weights=jnp.full(K, 1 / K))
    chex.assert_trees_all_close(state, expected, rtol=1e-5, atol=1e-6)
    assert_close(grads, weighted_sum(state.task_weights, stacked))


@pytest.mark.parametrize("options", [{"measure": "lagged"}, {"microbatch_size": 4}])
def test_keyword_arguments_are_the_losses(options):
    balanced = balanced_value_and_grad(losses_fn, GABA, **options)
    fn = functools.partial(balanced.value_and_grad, PARAMS, balanced.init(PARAMS))
    assert_close(fn(X, Y, scales=tuple(SCALES)), fn(x=X, y=Y, scales=tuple(SCALES)))


@pytest.mark.slow
def test_vmap_over_seeds_and_donation():
    balanced = balanced_value_and_grad(losses_fn, GABA, every=2)
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    state = jax.vmap(balanced.init)(params)
    step = jax.jit(
        jax.vmap(lambda p, s: balanced.value_and_grad(p, s, *BATCH)),
        donate_argnums=1,
        keep_unused=True,
    )
    for _ in range(3):
        given = state
        (_, grads), state = step(params, state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    one = balanced.init(PARAMS)
    for _ in range(3):
        (_, expected), one = balanced.value_and_grad(PARAMS, one, *BATCH)
    assert_close(at((grads, state), 0), (expected, one))
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "stacked"}, r"measure='stacked' must be \"exact\" or \"lagged\""),
        ({"every": 0}, r"every=0 must be an integer of at least 1"),
        ({"every": 1.5}, r"every=1.5 must be an integer"),
        ({"every": True}, r"every=True must be an integer"),
        ({"microbatch_size": 0}, r"microbatch_size=0 must be"),
        (
            {"nonfinite": "drop", "encoder": encoder},
            r'"drop" needs the gradients of the tasks apart',
        ),
        ({"nonfinite": "skip"}, r"nonfinite='skip'"),
        ({"weight_task_specific": False}, r"weight_task_specific=False needs an explicit shared"),
        ({"encoder": "backbone"}, r"encoder='backbone' must be a function"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        balanced_value_and_grad(losses_fn, GABA, **options)


def test_wrong_weighting_and_losses():
    with pytest.raises(ValueError, match="weighting"):
        balanced_value_and_grad(losses_fn, "gaba")
    with pytest.raises(ValueError, match=r"losses_fn came as a Weighting\. The function"):
        balanced_value_and_grad(GABA2, losses_fn)
    balanced = balanced_value_and_grad(losses_fn, GABA2)
    with pytest.raises(ValueError, match=r"returned 3 losses, but the weighting has num_tasks=2"):
        balanced.value_and_grad(PARAMS, balanced.init(PARAMS), *BATCH)
    with pytest.raises(ValueError, match=r"task_mask must be a bool array of shape \(2,\)"):
        balanced.value_and_grad(PARAMS, balanced.init(PARAMS), *BATCH, task_mask=jnp.ones(3))


def test_a_state_of_other_parameters():
    balanced = balanced_value_and_grad(losses_fn, GABA)
    with pytest.raises(ValueError, match=r"state is of 1 parameter leaves and 3 tasks, but there"):
        balanced.value_and_grad(PARAMS, balanced.init(jnp.ones(2)), *BATCH)
    with pytest.raises(ValueError, match=r"params came as a BalanceState\. The parameters come"):
        balanced.value_and_grad(balanced.init(PARAMS), PARAMS, *BATCH)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"measure": "lagged"}])
def test_low_precision_under_strict_promotion(options):
    def losses(params, x):
        h = jnp.tanh(x @ params["w"])
        return h.mean(), (h**2).mean()

    params, x = {"w": jnp.full((2, 3), 0.1, jnp.bfloat16)}, jnp.ones((4, 2), jnp.bfloat16)
    balanced = balanced_value_and_grad(losses, weighting.uniform(2), **options)
    with jax.numpy_dtype_promotion("strict"):
        (_, grads), _ = balanced.value_and_grad(params, balanced.init(params), x)
    assert grads["w"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_float64():
    with jax.enable_x64(True):
        params, batch = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (PARAMS, BATCH)
        )
        expected = stacked_grads(params, *batch)[1]
        for options in ({}, {"measure": "lagged"}, {"microbatch_size": 3}):
            fn = functools.partial(losses_fn, scales=batch[2])
            balanced = balanced_value_and_grad(fn, weighting.uniform(K), **options)
            ((losses, grads), state) = balanced.value_and_grad(
                params, balanced.init(params), *batch[:2]
            )
            chex.assert_trees_all_equal_dtypes((losses, grads), (batch[2], params))
            assert state.task_weights.dtype == jnp.float32
            weights = jnp.full(K, np.float32(1 / K), jnp.float64)
            chex.assert_trees_all_close(grads, weighted_sum(weights, expected), rtol=1e-7)
