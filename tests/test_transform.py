"""balance and gaba: what an update does, and every rule about skips, masks and sharing."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import (
    balance,
    balanced_value_and_grad,
    equalize,
    exclude,
    gaba,
    gradnorm,
    only,
    task_value_and_grad,
    weighting,
)
from gaba_jax.weighting import Weighting
from tests.slow import rest_slow

PARAMS = {"shared": jnp.zeros(2), "head_a": jnp.zeros(1), "head_b": jnp.zeros(1)}


def gradients(a, b, head_a=1.0, head_b=1.0, dtype=jnp.float32):
    """Stacked gradients of two tasks with norms a and b on the shared leaf."""
    leaf = jnp.array([[a, 0.0], [0.0, b]], dtype)
    return {
        "shared": leaf,
        "head_a": jnp.array([[head_a], [0]], dtype),
        "head_b": jnp.array([[0], [head_b]], dtype),
    }


def unstabilized(num_tasks=2, **kwargs):
    return balance(weighting.inverse_share(num_tasks), **kwargs)


# A head counts as shared only once two tasks pull on it, so one leaf [2] is what is measured here.
AUTOMATIC = {"shared": jnp.array([[3.0, 4.0], [0.0, 1.0]]), "head_a": jnp.array([[9.0], [0.0]])}


class TestUpdate:
    def test_is_the_gradient_of_the_weighted_loss(self, toy):
        losses_fn, params, batch = toy
        tx = gaba(beta=0.5, warmup_steps=0)
        losses, grads = jax.jit(task_value_and_grad(losses_fn))(params, *batch)
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)

        def weighted(params):
            losses = losses_fn(params, *batch)
            return state.task_weights[0] * losses["health"] + state.task_weights[1] * losses["rul"]

        expected = jax.grad(weighted)(params)
        for name, leaf in zip(
            jax.tree.leaves(jax.tree.map(lambda u, e: jnp.abs(u - e).max(), updates, expected)),
            jax.tree.leaves(expected),
            strict=True,
        ):
            assert name <= 1e-5 * jnp.abs(leaf).max()
        assert losses.shape == (2,)

    def test_contributions_become_equal(self, toy):
        losses_fn, params, batch = toy
        tx = gaba(beta=0.0, warmup_steps=0, min_weight=0.0)
        _, grads = task_value_and_grad(losses_fn)(params, *batch)
        _, state = tx.update(grads, tx.init(params), params)
        assert state.task_norms[1] > 100 * state.task_norms[0]
        contributions = state.task_weights * state.task_norms
        np.testing.assert_allclose(contributions[0], contributions[1], rtol=1e-5)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    def test_keeps_the_dtype(self, dtype):
        tx = unstabilized()
        params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
        updates, state = tx.update(gradients(3, 1, dtype=dtype), tx.init(params), params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert state.task_weights.dtype == state.task_norms.dtype == jnp.float32

    def test_weight_task_specific(self):
        heads = exclude("head_*")
        weighted, plain = (
            unstabilized(shared=heads, weight_task_specific=choice) for choice in (True, False)
        )
        for tx, head_weights in [(weighted, [0.25, 0.75]), (plain, [1, 1])]:
            updates, _ = tx.update(gradients(3, 1), tx.init(PARAMS), PARAMS)
            np.testing.assert_allclose(updates["shared"], [0.75, 0.75], rtol=1e-6)
            np.testing.assert_allclose(updates["head_a"], head_weights[:1], rtol=1e-6)
            np.testing.assert_allclose(updates["head_b"], head_weights[1:], rtol=1e-6)

    def test_unknown_extra_arguments_are_ignored(self):
        tx = gaba()
        plain = tx.update(gradients(1, 1), tx.init(PARAMS), PARAMS)
        extra = tx.update(gradients(1, 1), tx.init(PARAMS), PARAMS, value=1.0, anything="else")
        jax.tree.map(np.testing.assert_array_equal, extra, plain)

    def test_state_is_what_was_applied(self):
        tx = optax.chain(gaba(beta=0.0, warmup_steps=1), optax.sgd(1.0))
        state = tx.init(PARAMS)
        np.testing.assert_array_equal(optax.tree.get(state, "task_weights"), [0.5, 0.5])
        for expected in ([0.5, 0.5], [0.25, 0.75]):
            updates, state = tx.update(gradients(3, 1), state, PARAMS)
            np.testing.assert_allclose(optax.tree.get(state, "task_weights"), expected, rtol=1e-6)
            np.testing.assert_allclose(
                updates["shared"], -np.array([3, 1]) * np.array(expected), rtol=1e-6
            )

    def test_a_rule_without_needs_measures_nothing(self):
        tx = balance(weighting.constant(2, [1.0, 10.0]))
        updates, state = tx.update(gradients(3, 1), tx.init(PARAMS), PARAMS)
        np.testing.assert_array_equal(state.task_norms, [0, 0])
        np.testing.assert_array_equal(updates["shared"], [3, 10])
        watched = balance(weighting.uniform(2)._replace(needs=frozenset({"norms"})))
        _, state = watched.update(gradients(3, 1), watched.init(PARAMS), PARAMS)
        np.testing.assert_array_equal(state.task_weights, [0.5, 0.5])


class TestSharing:
    def test_is_found_from_the_gradients(self):
        tx = unstabilized()
        both = {"shared": AUTOMATIC["shared"], "head_a": AUTOMATIC["head_a"]}
        params = {"shared": jnp.zeros(2), "head_a": jnp.zeros(1)}
        _, state = tx.update(both, tx.init(params), params)
        np.testing.assert_allclose(state.task_norms, [5, 1], rtol=1e-6)
        np.testing.assert_array_equal(state.seen_by_task, [[True, False], [True, True]])

    def test_is_remembered_when_a_gradient_vanishes(self):
        tx = unstabilized()
        state = tx.init(PARAMS)
        _, state = tx.update(gradients(3, 1), state)
        _, state = tx.update(gradients(3, 0), state)  # a dead ReLU
        np.testing.assert_allclose(state.task_norms, [3, 0])
        np.testing.assert_allclose(state.task_weights, [0, 1])
        assert state.seen_by_task.tolist() == [[True, False], [False, True], [True, True]]

    def test_no_shared_leaf_is_no_measurement(self):
        tx = unstabilized()
        updates, state = tx.update(gradients(0, 1), tx.init(PARAMS), PARAMS)
        np.testing.assert_array_equal(state.task_weights, [0.5, 0.5])
        np.testing.assert_array_equal(updates["shared"], [0, 0.5])
        assert state.since_measured == 0
        assert state.nonfinite_count == 0
        # What was seen is kept, so the other task's gradient alone completes the picture.
        _, state = tx.update(gradients(3, 0), state, PARAMS)
        assert state.since_measured == 1
        np.testing.assert_allclose(state.task_norms, [3, 0])

    def test_measure_on_narrows_the_norms_not_the_weights(self):
        params = {"first": jnp.zeros(1), "last": jnp.zeros(1)}
        grads = {"first": jnp.array([[100.0], [1.0]]), "last": jnp.array([[3.0], [1.0]])}
        tx = unstabilized(measure_on=only("last"))
        updates, state = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(state.task_norms, [3, 1])
        np.testing.assert_allclose(updates["first"], [25.75], rtol=1e-6)

    def test_only_automatic_sharing_writes_what_was_seen(self):
        tx = unstabilized(shared=only("shared"))
        _, state = tx.update(gradients(3, 1), tx.init(PARAMS))
        assert not state.seen_by_task.any()
        np.testing.assert_allclose(state.task_norms, [3, 1])


class TestNonfinite:
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_average_step_and_weights_are_held(self, value):
        tx = gaba(beta=0.9, warmup_steps=1)
        state = tx.init(PARAMS)
        for _ in range(4):
            _, state = tx.update(gradients(3, 1), state)
        updates, after = tx.update(gradients(3, value), state)
        assert after.nonfinite_count == 1
        np.testing.assert_equal(
            jax.tree.map(np.asarray, after._replace(nonfinite_count=state.nonfinite_count)),
            jax.tree.map(np.asarray, state),
        )
        assert np.isfinite(updates["shared"][0]) or not np.isfinite(value)  # 0 * inf is NaN
        assert not np.isfinite(updates["shared"][1])
        # As if it had not been: the next update is that of an uninterrupted run.
        _, resumed = tx.update(gradients(2, 1), after)
        _, expected = tx.update(gradients(2, 1), state)
        np.testing.assert_array_equal(resumed.task_weights, expected.task_weights)

    def test_at_the_first_update(self):
        tx = unstabilized()
        _, state = tx.update(gradients(3, np.nan), tx.init(PARAMS))
        assert state.nonfinite_count == 1
        assert not state.seen_by_task.any()
        np.testing.assert_array_equal(state.task_norms, [0, 0])
        np.testing.assert_array_equal(state.task_weights, [0.5, 0.5])

    def test_in_a_head_is_not_a_matter_of_the_shared_norms(self):
        tx = unstabilized()
        _, state = tx.update(gradients(3, 1), tx.init(PARAMS))
        updates, state = tx.update(gradients(3, 1, head_b=np.nan), state)
        assert state.nonfinite_count == 0
        assert np.isfinite(updates["shared"]).all()
        assert np.isnan(updates["head_b"]).all()

    @pytest.mark.parametrize("where", ["shared", "head"])
    def test_drop_leaves_the_task_out_of_this_update(self, where):
        tx = unstabilized(nonfinite="drop")
        bad = gradients(3, np.nan) if where == "shared" else gradients(3, 1, head_b=np.inf)
        state = tx.init(PARAMS)
        _, state = tx.update(gradients(3, 1), state)
        updates, after = jax.jit(tx.update)(bad, state)
        np.testing.assert_array_equal(after.task_weights, [1, 0])
        np.testing.assert_array_equal(updates["shared"], [3, 0])
        np.testing.assert_array_equal(updates["head_b"], [0])
        np.testing.assert_allclose(after.next_task_weights, [0.25, 0.75], rtol=1e-6)
        _, healthy = tx.update(gradients(3, 1), after)
        np.testing.assert_allclose(healthy.task_weights, [0.25, 0.75], rtol=1e-6)

    def test_drop_of_all_tasks_is_a_zero_update(self):
        tx = unstabilized(nonfinite="drop")
        updates, state = tx.update(gradients(np.nan, np.nan), tx.init(PARAMS))
        assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
        np.testing.assert_array_equal(state.task_weights, [0, 0])
        np.testing.assert_array_equal(state.next_task_weights, [0.5, 0.5])

    def test_drop_does_not_take_large_for_infinite(self):
        tx = unstabilized(nonfinite="drop")
        updates, state = tx.update(gradients(1e30, 1e-30, head_a=1e30), tx.init(PARAMS))
        assert state.nonfinite_count == 0
        assert np.isfinite(updates["head_a"]).all()
        assert state.task_weights[1] > 0

    def test_with_apply_if_finite_after(self):
        tx = optax.chain(gaba(), optax.apply_if_finite(optax.sgd(1.0), 3))
        state = tx.init(PARAMS)
        updates, state = tx.update(gradients(3, np.nan), state, PARAMS)
        assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
        updates, _ = tx.update(gradients(3, 1), state, PARAMS)
        np.testing.assert_array_equal(updates["shared"], [-1.5, -0.5])


THREE = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0], [7.0, 0.0]])}
W = {"w": jnp.zeros(2)}


class TestMask:
    def test_absent_tasks(self):
        tx = gaba(3, beta=0.5, warmup_steps=0, min_weight=0.0)
        _, state = tx.update(THREE, tx.init(W))
        poisoned = {"w": THREE["w"].at[2].set(np.nan)}
        mask = jnp.array([True, True, False])
        updates, after = jax.jit(tx.update)(poisoned, state, task_mask=mask)
        assert after.task_weights[2] == 0
        np.testing.assert_allclose(after.task_weights.sum(), 1, rtol=1e-6)
        np.testing.assert_allclose(
            after.task_weights[0] / after.task_weights[1],
            after.next_task_weights[0] / after.next_task_weights[1],
            rtol=1e-6,
        )
        assert after.next_task_weights[2] == state.next_task_weights[2]
        np.testing.assert_allclose(after.task_norms, [1, 2, 7])  # keeps its last norm
        assert np.isfinite(updates["w"]).all()
        assert after.nonfinite_count == 0

    def test_a_full_mask_changes_nothing(self):
        tx = gaba(3, warmup_steps=0)
        state = tx.init(W)
        without = tx.update(THREE, state)
        with_mask = tx.update(THREE, state, task_mask=jnp.ones(3, bool))
        jax.tree.map(np.testing.assert_array_equal, without, with_mask)

    def test_one_present_task_gets_everything_and_teaches_nothing(self):
        tx = gaba(3, warmup_steps=0)
        _, state = tx.update(THREE, tx.init(W))
        updates, after = tx.update(THREE, state, task_mask=jnp.array([False, False, True]))
        np.testing.assert_allclose(after.task_weights, [0, 0, 1], rtol=1e-6)
        np.testing.assert_allclose(updates["w"], [7, 0], rtol=1e-6)
        np.testing.assert_array_equal(after.next_task_weights, state.next_task_weights)
        jax.tree.map(np.testing.assert_array_equal, after.weighting_state, state.weighting_state)

    def test_no_present_task_is_a_zero_update(self):
        tx = gaba(3, warmup_steps=0)
        updates, state = tx.update(THREE, tx.init(W), task_mask=jnp.zeros(3, bool))
        np.testing.assert_array_equal(updates["w"], [0, 0])
        np.testing.assert_array_equal(state.task_weights, [0, 0, 0])

    def test_equal_shares_if_the_present_held_no_weight(self):
        tx = balance(weighting.constant(3, [0.0, 0.0, 6.0])._replace(absent="rescale"))
        _, state = tx.update(THREE, tx.init(W), task_mask=jnp.array([True, True, False]))
        np.testing.assert_array_equal(state.task_weights, [3, 3, 0])

    def test_a_rule_without_state_keeps_the_weight_of_an_absent_task(self):
        tx = unstabilized(3)
        _, state = tx.update(THREE, tx.init(W))
        np.testing.assert_allclose(state.next_task_weights, [0.45, 0.4, 0.15], rtol=1e-6)
        mask = jnp.array([True, True, False])
        _, state = tx.update(THREE, state, task_mask=mask)
        np.testing.assert_allclose(
            state.next_task_weights, [0.85 * 2 / 3, 0.85 / 3, 0.15], rtol=1e-6
        )
        np.testing.assert_allclose(state.task_weights, [2 / 3, 1 / 3, 0], rtol=1e-6)
        # A rejected update applies what was kept, not an equal share for the loudest task.
        _, state = tx.update({"w": THREE["w"].at[0].set(jnp.nan)}, state)
        np.testing.assert_allclose(state.task_weights[2], 0.15, rtol=1e-6)

    @pytest.mark.parametrize(
        "name",
        rest_slow(
            [
                "nash_mtl",
                "upgrad",
                "dual_projection",
                "cagrad",
                "aligned_mtl",
                "config",
                "imtl_g",
                "fairgrad",
                "scale_invariant",
                "geometric_mean",
            ],
            fast=["upgrad", "config", "scale_invariant"],
        ),
    )
    def test_an_absent_task_leaves_nothing_to_the_others_of_a_free_sum(self, name):
        """However large its last weight was: as if the two were alone."""
        grads = jnp.array([[300.0, 400.0, 0.0], [20.0, -10.0, 30.0], [0.0, 1e-3, 1e-3]])
        losses, mask = jnp.array([1.0, 2.0, 1e-3]), jnp.array([True, True, False])
        three, two = (balance(getattr(weighting, name)(k)) for k in (3, 2))
        state, params = three.init(jnp.zeros(3)), jnp.zeros(3)
        of_three, of_two = jax.jit(three.update), jax.jit(two.update)
        _, state = of_three(grads, state, params, task_losses=losses)
        _, state = of_three(grads, state, params, task_losses=losses, task_mask=mask)
        _, expected = of_two(grads[:2], two.init(params), params, task_losses=losses[:2])
        np.testing.assert_allclose(state.task_weights, [*expected.task_weights, 0], rtol=1e-5)

    def test_negative_weights_of_the_present_are_left_as_they_are(self):
        tx = balance(weighting.constant(3, [1.0, -2.0, 0.5]))
        _, state = tx.update(THREE, tx.init(W), task_mask=jnp.array([True, True, False]))
        np.testing.assert_array_equal(state.task_weights, [1, -2, 0])

    def test_a_task_absent_from_the_start_keeps_its_equal_share(self):
        tx = gaba(3, warmup_steps=0, min_weight=0.0, debias=True)
        mask = jnp.array([True, True, False])
        _, state = tx.update(THREE, tx.init(W), task_mask=mask)
        np.testing.assert_allclose(state.next_task_weights, [4 / 9, 2 / 9, 1 / 3], rtol=1e-6)
        np.testing.assert_allclose(state.task_weights, [2 / 3, 1 / 3, 0], rtol=1e-6)


def recorder(needs):
    """A rule whose state is the statistics it was last given."""

    def empty():
        return {
            "norms": jnp.zeros(3) if "norms" in needs else None,
            "cosines": jnp.zeros((3, 3)) if "cosines" in needs else None,
            "losses": jnp.zeros(3) if "losses" in needs else None,
            "elapsed": jnp.zeros([], jnp.int32),
        }

    def update(stats, state):
        seen = {key: old if old is None else getattr(stats, key) for key, old in state.items()}
        return jnp.full(3, 1 / 3, jnp.float32), seen

    return Weighting(3, frozenset(needs), empty, update, np.full(3, 1 / 3, np.float32))


class TestStatistics:
    def test_cosines_and_losses_reach_the_rule(self):
        tx = balance(recorder({"norms", "cosines", "losses"}))
        losses = jnp.array([1.0, 2.0, 3.0])
        _, state = tx.update(THREE, tx.init(W), task_losses=losses)
        seen = state.weighting_state
        np.testing.assert_allclose(seen["norms"], [1, 2, 7], rtol=1e-6)
        np.testing.assert_allclose(seen["cosines"], [[1, 0, 1], [0, 1, 0], [1, 0, 1]], atol=1e-6)
        np.testing.assert_array_equal(seen["losses"], losses)
        np.testing.assert_array_equal(state.task_cosines, seen["cosines"])

    def test_of_an_absent_task(self):
        tx = balance(recorder({"norms", "cosines", "losses"}))
        losses = jnp.array([1.0, 2.0, np.nan])
        _, before = tx.update(THREE, tx.init(W), task_losses=jnp.ones(3))
        mask = jnp.array([True, True, False])
        _, state = tx.update(THREE, before, task_losses=losses, task_mask=mask)
        seen = state.weighting_state
        np.testing.assert_allclose(seen["norms"], [1, 2, 0], rtol=1e-6)
        np.testing.assert_allclose(seen["cosines"], np.eye(3), atol=1e-6)
        np.testing.assert_array_equal(seen["losses"], [1, 2, 1])
        np.testing.assert_array_equal(state.task_cosines, before.task_cosines)  # keeps its last
        assert state.nonfinite_count == 0

    def test_a_nonfinite_loss_rejects_where_losses_are_needed(self):
        losses = jnp.array([1.0, np.inf, 3.0])
        for needs, rejected in [({"norms", "losses"}, 1), ({"norms"}, 0), ({"losses"}, 1)]:
            tx = balance(recorder(needs))
            _, state = tx.update(THREE, tx.init(W), task_losses=losses)
            assert state.nonfinite_count == rejected

    @pytest.mark.parametrize("shape", [(3, 1), (2,), ()])
    def test_a_rule_that_returns_another_shape(self, shape):
        rule = recorder({"norms"})._replace(update=lambda stats, state: (jnp.ones(shape), state))
        tx = balance(rule)
        with pytest.raises(ValueError, match=r"weights of shape \(3,\), one per task"):
            tx.update(THREE, tx.init(W))

    def test_missing_losses_raise_at_trace_time(self):
        tx = balance(recorder({"losses"}))
        with pytest.raises(ValueError, match=r"task_losses=losses.*apply_gradients"):
            jax.jit(tx.update)(THREE, tx.init(W))
        with pytest.raises(ValueError, match=r"shape \(3,\).*got shape \(\)"):
            tx.update(THREE, tx.init(W), task_losses=1.0)
        with pytest.raises(ValueError, match=r"shape \(3,\), got a dict"):
            tx.update(THREE, tx.init(W), task_losses={"a": 1.0})


@pytest.mark.parametrize("driver", ["stacked", "balanced"])
def test_a_state_that_was_restored_as_a_dict_says_how_to_restore_it(driver):
    grads, rule = jnp.ones((2, 3)), weighting.gaba(2)
    tx = balance(rule)
    restored = tx.init(jnp.ones(3))._asdict()
    balanced = balanced_value_and_grad(lambda p: (p.sum(), (p**2).sum()), rule)
    run = {
        "stacked": lambda: tx.update(grads, restored, jnp.ones(3)),
        "balanced": lambda: balanced.value_and_grad(jnp.ones(3), restored),
    }[driver]
    with pytest.raises(ValueError, match=r"must be a BalanceState, got a dict.*without a target"):
        run()


def test_a_line_search_in_its_chain_raises():
    tx, params = optax.chain(gaba(), optax.lbfgs()), jnp.ones(3)
    with pytest.raises(ValueError, match=r"value_fn is for a line search .*Hold the weights"):
        tx.update(
            jnp.ones((2, 3)), tx.init(params), params, value=1.0, grad=params, value_fn=jnp.sum
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: balance(weighting.uniform), "Call the rule first"),
        (lambda: balance(equalize(2)), r"got an optax transform. Pass the rule itself, such as"),
        (lambda: balance("gaba"), "got 'gaba'. Make one with a rule"),
        (
            lambda: equalize(2, ratios={"a": 1.0, "b": 2.0}),
            r"ratios must be 2 numbers.*sorted keys",
        ),
        (lambda: gaba(task_priorities="12"), "task_priorities must be 2 numbers"),
        (
            lambda: balance(weighting.uniform(3)._replace(initial_weights=np.ones(2))),
            r"initial_weights must have shape \(3,\)",
        ),
        (
            lambda: balance(weighting.uniform(3)._replace(needs=("norms",))),
            r"must be a frozenset, such as frozenset\(\{\"norms\"\}\)",
        ),
        (
            lambda: balance(weighting.uniform(3)._replace(needs=frozenset({"norms", "moments"}))),
            r"names \['moments'\]",
        ),
        (lambda: gaba(nonfinite="skip"), '"propagate" or "drop"'),
        (lambda: gaba(weight_task_specific=False), "explicit shared"),
        (lambda: gaba(1), "num_tasks=1"),
        (lambda: gaba(4, min_weight=0.3), "most is 0.25"),
    ],
)
def test_construction_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("mask", [jnp.ones(2), jnp.ones(3, bool), [1, 0]])
def test_a_wrong_mask(mask):
    tx = gaba()
    with pytest.raises(ValueError, match=r"bool array of shape \(2,\)"):
        tx.update(gradients(1, 1), tx.init(PARAMS), task_mask=mask)


@pytest.mark.parametrize("mask", [{"rul": True, "health": False}, "rul"])
def test_a_mask_that_is_no_array(mask):
    tx = gaba()
    with pytest.raises(ValueError, match=r"shape \(2,\).*got a (dict|str); list its values"):
        tx.update(gradients(1, 1), tx.init(PARAMS), task_mask=mask)


def test_a_state_of_another_number_of_tasks():
    with pytest.raises(ValueError, match=r"and 3 tasks, but there are .* num_tasks=2"):
        gaba().update(gradients(1, 1), gaba(3).init(PARAMS), PARAMS)


@pytest.mark.parametrize("transform", [gaba, equalize, gradnorm])
def test_a_transform_takes_and_explains_what_its_rule_and_balance_take(transform):
    """The signatures are written out, for editors and type checkers; they say the same."""
    rule = getattr(weighting, transform.__name__)
    own, of_rule, of_balance = (
        dict(inspect.signature(function).parameters) for function in (transform, rule, balance)
    )
    del of_balance["weighting"]
    expected = of_rule | of_balance
    expected["num_tasks"] = expected["num_tasks"].replace(default=own["num_tasks"].default)
    assert list(own.values()) == list(expected.values())
    arguments = inspect.getdoc(transform).split("Args:\n")[1].split("\n\n")[0]
    assert re.findall(r"^  (\w+): ", arguments, re.M) == list(own)
    about = inspect.getdoc(rule).split("\n\n", 1)[1].split("Args:\n")[0]
    assert ".. math::" in about
    assert about in inspect.getdoc(transform)
