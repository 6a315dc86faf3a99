"""The page "Use it with" beyond the wrappers: mistakes nobody sees, a sum left behind, labels that
are missing, terms that are not balanced, many tasks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

from gaba_jax import (
    TaskMultiSteps,
    balance,
    balanced_value_and_grad,
    exclude,
    gaba,
    only,
    task_value_and_grad,
    weighting,
)
from tests.slow import rest_slow


def scan(tx, losses_fn, params, batch, steps=20):
    """The parameters and the optimizer's state after a run whose loop keeps every shape."""

    def step(carry, _):
        params, state = carry
        _, grads = task_value_and_grad(losses_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    return jax.jit(lambda start: jax.lax.scan(step, start, length=steps)[0])(start)


def update_of(tx, losses_fn, params, batch):
    """One update and the state after it."""
    _, grads = jax.jit(task_value_and_grad(losses_fn))(params, *batch)
    return tx.update(grads, tx.init(params), params)


class TestSilentMistakes:
    """What happens without a word; each has its remedy beside it."""

    @pytest.mark.parametrize("tx", [optax.sgd(1e-3), optax.adamw(1e-3)], ids=["sgd", "adamw"])
    def test_a_forgotten_balancer_broadcasts_the_parameters(self, toy, tx):
        losses_fn, params, batch = toy
        updates, _ = update_of(tx, losses_fn, params, batch)
        after = optax.apply_updates(params, updates)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(lambda p: (2, *p.shape), params)
        with pytest.raises(TypeError, match="carry input and carry output must have equal types"):
            scan(tx, losses_fn, params, batch)

    def test_masked_gaba_leaves_the_heads_stacked(self, toy):
        losses_fn, params, batch = toy
        trunk = {"backbone": True, "rul_head": False, "health_head": False}
        tx = optax.chain(optax.masked(balance(weighting.inverse_norm(2)), trunk), optax.sgd(1e-3))
        updates, _ = update_of(tx, losses_fn, params, batch)
        assert updates["backbone"]["kernel"].shape == params["backbone"]["kernel"].shape
        assert updates["rul_head"].shape == (2, *params["rul_head"].shape)
        remedy = balance(
            weighting.inverse_norm(2), shared=exclude("*_head"), weight_task_specific=False
        )
        meant, _ = update_of(optax.chain(remedy, optax.sgd(1e-3)), losses_fn, params, batch)
        chex.assert_trees_all_close(meant["backbone"], updates["backbone"], rtol=1e-6)
        np.testing.assert_allclose(meant["rul_head"], updates["rul_head"].sum(0), rtol=1e-6)

    def test_clipping_first_divides_by_the_norm_of_the_stack(self, toy, by_hand):
        losses_fn, params, batch = toy
        balancer, clip = balance(weighting.inverse_norm(2)), optax.clip_by_global_norm(0.1)
        weights, update = by_hand(losses_fn, params, *batch)
        _, grads = task_value_and_grad(losses_fn)(params, *batch)
        before, state = update_of(optax.chain(clip, balancer), losses_fn, params, batch)
        expected = jax.tree.map(lambda u: 0.1 * u / optax.tree.norm(grads), update)
        chex.assert_trees_all_close(before, expected, rtol=1e-4, atol=1e-8)
        assert optax.tree.norm(before) < 1e-3  # far under the 0.1 that was asked for
        np.testing.assert_allclose(state[1].task_weights, weights, rtol=1e-5)  # and nothing shows
        after, _ = update_of(optax.chain(balancer, clip), losses_fn, params, batch)
        np.testing.assert_allclose(optax.tree.norm(after), 0.1, rtol=1e-5)

    def test_weight_decay_first_makes_every_head_shared(self, toy):
        losses_fn, params, batch = toy
        balancer, decay = balance(weighting.inverse_norm(2)), optax.add_decayed_weights(0.1)
        _, (_, state) = update_of(optax.chain(decay, balancer), losses_fn, params, batch)
        assert state.seen_by_task.all()
        _, (right, _) = update_of(optax.chain(balancer, decay), losses_fn, params, batch)
        assert right.seen_by_task.all(axis=1).tolist() == [True, True, False, False]
        assert not np.allclose(state.task_norms, right.task_norms, rtol=1e-2)

    def test_adam_first_scales_away_what_is_to_be_balanced(self, toy):
        """Its state starts in the shapes of the parameters, which only a loop notices."""
        losses_fn, params, batch = toy
        tx = optax.chain(optax.scale_by_adam(), balance(weighting.inverse_norm(2)))
        _, (_, state) = update_of(tx, losses_fn, params, batch)
        _, right = update_of(balance(weighting.inverse_norm(2)), losses_fn, params, batch)
        assert right.task_norms[1] > 100 * right.task_norms[0]
        assert state.task_norms[1] < 2 * state.task_norms[0]
        with pytest.raises(TypeError, match="carry input and carry output must have equal types"):
            scan(tx, losses_fn, params, batch)

    def test_accumulating_first_measures_zeros(self, toy):
        """Mini-steps that hand on zeros count as measurements, and pull the average to 1/K."""
        losses_fn, params, batch = toy
        _, grads = jax.jit(task_value_and_grad(losses_fn))(params, *batch)
        average = gaba(warmup_steps=0, beta=0.5, min_weight=0.0)
        first = optax.chain(aggregating.accumulate_avg_updates(2), average)
        around = TaskMultiSteps(average, 2).gradient_transformation()
        weights = []
        for tx in (first, around):
            state, update = tx.init(params), jax.jit(tx.update)
            for _ in range(7):
                _, state = update(grads, state, params)
            weights.append(optax.tree.get(state, "task_weights"))
        assert weights[0][0] < 0.7
        assert weights[1][0] > 0.9

    def test_lookahead_in_a_chain_loses_a_mask(self, toy):
        losses_fn, params, batch = toy
        tx = optax.chain(optax.lookahead(balance(weighting.inverse_norm(2)), 3, 0.5))
        both = optax.LookaheadParams.init_synced(params)
        _, grads = task_value_and_grad(losses_fn)(params, *batch)
        mask = jnp.array([True, False])
        _, state = tx.update(grads, tx.init(both), both, task_mask=mask)
        assert (optax.tree.get(state, "task_weights") > 0).all()

    def test_gaba_within_partition_leaves_the_heads_stacked(self, toy):
        losses_fn, params, batch = toy
        labels = {"backbone": "trunk", "rul_head": "head", "health_head": "head"}
        tx = optax.partition(
            {"trunk": balance(weighting.inverse_norm(2)), "head": optax.identity()}, labels
        )
        updates, _ = update_of(tx, losses_fn, params, batch)
        assert updates["backbone"]["kernel"].shape == params["backbone"]["kernel"].shape
        assert updates["rul_head"].shape == (2, *params["rul_head"].shape)


@pytest.mark.parametrize("opaque", [False, True])
def test_sam_refuses_masks_and_losses(toy, opaque):
    losses_fn, params, batch = toy
    losses, grads = task_value_and_grad(losses_fn)(params, *batch)
    balancer = balance(weighting.inverse_norm(2))
    inner = optax.chain(balancer, optax.sgd(0.1)) if opaque else optax.sgd(0.1)
    sam = optax.contrib.sam(inner, inner, opaque_mode=opaque)
    tx = optax.chain(optax.identity() if opaque else balancer, sam)
    given = {"grad_fn": lambda params, _: grads} if opaque else {}
    for extra in ({"task_mask": jnp.array([True, False])}, {"task_losses": losses}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(extra))}'"):
            tx.update(grads, tx.init(params), params, **given, **extra)


class TestMovingFromASum:
    def test_rescaled_has_the_gradient_scale_of_the_sum(self, toy):
        losses_fn, params, batch = toy
        tx = balance(weighting.rescaled(weighting.uniform(2), 2))
        updates, _ = update_of(tx, losses_fn, params, batch)
        expected = jax.grad(lambda p: sum(losses_fn(p, *batch).values()))(params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-4)

    def test_a_threshold_set_for_the_sum_hardly_clips(self, toy):
        losses_fn, params, batch = toy
        summed = jax.grad(lambda p: sum(losses_fn(p, *batch).values()))(params)
        updates, state = update_of(balance(weighting.inverse_norm(2)), losses_fn, params, batch)
        np.testing.assert_array_less(100 * optax.tree.norm(updates), optax.tree.norm(summed))
        quiet = state.task_norms.min()
        assert optax.tree.norm(updates["backbone"]) < 2 * quiet

    @pytest.mark.parametrize("fixed", [0.3, 0.0])
    def test_a_term_with_its_own_weight(self, toy, by_hand, fixed):
        """The K + 1 gradients of one forward pass: K are balanced, the last one is added."""
        losses_fn, params, batch = toy
        tx = balance(weighting.inverse_norm(2))

        def with_l2(params, *batch):
            l2 = 0.5 * jnp.sum(params["backbone"]["kernel"] ** 2)
            return [*jax.tree.leaves(losses_fn(params, *batch)), l2]

        _, grads = jax.jit(task_value_and_grad(with_l2))(params, *batch)
        tasks, extra = (jax.tree.map(lambda g, at=at: g[at], grads) for at in (slice(2), 2))
        balanced, state = tx.update(tasks, tx.init(params), params)
        total = jax.tree.map(lambda b, e: b + fixed * e, balanced, extra)
        weights, expected = by_hand(losses_fn, params, *batch)
        expected["backbone"]["kernel"] += fixed * params["backbone"]["kernel"]
        chex.assert_trees_all_close(total, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.task_weights, weights, rtol=1e-5)


class TestPartialLabels:
    """Three tasks; labels are NaN where there are none, and whole batches lack a task."""

    X = jax.random.normal(jax.random.key(0), (12, 4))

    @staticmethod
    def params():
        keys = jax.random.split(jax.random.key(1), 4)
        heads = [jax.random.normal(key, (8,)) / 3 for key in keys[1:]]
        return {"backbone": jax.random.normal(keys[0], (4, 8)) / 2, "heads": heads}

    @staticmethod
    def losses_fn(params, x, labels):
        h = jnp.tanh(x @ params["backbone"])

        def loss(head, labels):
            known = ~jnp.isnan(labels)
            errors = h @ head - jnp.where(known, labels, 0.0)
            return jnp.sum(jnp.where(known, errors**2, 0.0)) / jnp.maximum(known.sum(), 1)

        return [loss(head, labels[:, i]) for i, head in enumerate(params["heads"])]

    def batches(self):
        """Every other example lacks the second label; some batches lack one or two tasks."""
        labels = (self.X[:, :3] * jnp.array([1.0, 10.0, 100.0])).at[::2, 1].set(jnp.nan)
        for absent in ([], [0], [1, 2], [2], [0, 2], []):
            yield labels.at[:, jnp.array(absent, int)].set(jnp.nan)

    @pytest.mark.parametrize("stacked", [True, False])
    def test_end_to_end(self, by_hand, stacked):
        rule, optimizer = weighting.inverse_norm(3), optax.sgd(0.05)
        balancer, balanced = balance(rule), balanced_value_and_grad(self.losses_fn, rule)

        @jax.jit
        def train_step(params, state, labels):
            mask = jnp.any(~jnp.isnan(labels), axis=0)
            if stacked:
                _, grads = task_value_and_grad(self.losses_fn)(params, self.X, labels)
                grads, state = balancer.update(grads, state, params, task_mask=mask)
            else:
                (_, grads), state = balanced.value_and_grad(
                    params, state, self.X, labels, task_mask=mask
                )
            updates, _ = optimizer.update(grads, optimizer.init(params))
            return optax.apply_updates(params, updates), state

        params = expected = self.params()
        state = balanced.init(params)
        for labels in self.batches():
            present = ~jnp.isnan(labels).all(axis=0)
            params, state = train_step(params, state, labels)
            weights, update = by_hand(self.losses_fn, expected, self.X, labels, present=present)
            expected = jax.tree.map(lambda p, u: p - 0.05 * u, expected, update)
            np.testing.assert_allclose(state.task_weights, weights, rtol=1e-4)
        chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)


class TestManyTasks:
    K = 64

    @staticmethod
    def losses_fn(params, x, y):
        """The heads in one leaf [K, 8]: then what is shared has to be named."""
        errors = jnp.tanh(x @ params["backbone"]) @ params["heads"].T - y
        return jnp.mean(errors**2, axis=0)

    @pytest.mark.slow
    @pytest.mark.parametrize("rule", rest_slow(["gaba", "upgrad", "gradnorm"], fast=["gaba"]))
    def test_64_tasks_learn(self, rule):
        """Under rules on norms, on cosines and on losses, scales 100x apart."""
        x = jax.random.normal(jax.random.key(0), (32, 4))
        options = {"min_weight": 0.0, "warmup_steps": 0} if rule == "gaba" else {}
        targets = jnp.tanh(x @ jax.random.normal(jax.random.key(1), (4, self.K)))
        targets = targets * jnp.geomspace(1, 100, self.K)
        balanced = balanced_value_and_grad(
            self.losses_fn, getattr(weighting, rule)(self.K, **options), shared=only("backbone")
        )
        tx = optax.adam(0.1)

        def step(carry, _):
            params, state, opt_state = carry
            (losses, grads), state = balanced.value_and_grad(params, state, x, targets)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), state, opt_state), losses

        params = {"backbone": jnp.ones((4, 8)) / 8, "heads": jnp.zeros((self.K, 8))}
        start = (params, balanced.init(params), tx.init(params))
        (_, state, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, length=50))(start)
        assert state.task_weights.shape == (self.K,)
        assert state.nonfinite_count == 0
        assert losses[-1].sum() < 0.9 * losses[0].sum()

    @pytest.mark.parametrize(
        "path", rest_slow(["unroll", "scan", "balanced"], fast=["scan", "balanced"])
    )
    def test_64_tasks(self, by_hand, path):
        keys = jax.random.split(jax.random.key(0), 4)
        params = expected = {
            "backbone": jax.random.normal(keys[0], (4, 8)) / 2,
            "heads": jax.random.normal(keys[1], (self.K, 8)) / 3,
        }
        x = jax.random.normal(keys[2], (16, 4))
        y = jax.random.normal(keys[3], (16, self.K)) * jnp.geomspace(1, 100, self.K)
        rule, shared = weighting.inverse_norm(self.K), only("backbone")
        balancer = balance(rule, shared=shared)
        balanced = balanced_value_and_grad(self.losses_fn, rule, shared=shared)

        @jax.jit
        def train_step(params, state):
            if path == "balanced":
                (_, grads), state = balanced.value_and_grad(params, state, x, y)
            else:
                _, grads = task_value_and_grad(self.losses_fn, method=path)(params, x, y)
                grads, state = balancer.update(grads, state, params)
            return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), state

        state = balancer.init(params)
        for _ in range(3):
            weights, update = by_hand(self.losses_fn, expected, x, y)
            expected = jax.tree.map(lambda p, u: p - 0.5 * u, expected, update)
            params, state = train_step(params, state)
            np.testing.assert_allclose(state.task_weights, weights, rtol=1e-4)
        chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)

    def test_the_floor_has_to_fit(self):
        with pytest.raises(ValueError, match=r"min_weight=0.05 .* the most is 0.01562"):
            gaba(self.K)
        assert gaba(self.K, min_weight=1 / self.K).init(jnp.ones(3)).task_weights.shape == (64,)
