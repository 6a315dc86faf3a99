"""GradNorm: reference runs, the closed-form gradient, balance points, guards, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import balance, gaba, gradnorm, only, task_value_and_grad, weighting
from gaba_jax.weighting import TaskStats

VARIANTS = ["canonical", "published"]
# Keeps the gradient it is given as its state, and passes it on.
record = optax.GradientTransformation(jnp.zeros_like, lambda grad, state, params=None: (grad, grad))


def gradient_of(state):
    return state.optimizer_state[0]


def stats_of(norms, losses, present=None):
    norms = jnp.asarray(norms, jnp.float32)
    present = jnp.ones(norms.shape, bool) if present is None else jnp.asarray(present)
    return TaskStats(norms, None, jnp.asarray(losses, jnp.float32), present, jnp.int32(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden(golden, variant):
    """The whole training run of a reference that differentiates twice, model included."""
    canonical = variant == "canonical"
    arrays = golden("gradnorm_canonical" if canonical else "gradnorm_paper")
    x, rul = jnp.asarray(arrays["x"]), jnp.asarray(arrays["rul"])
    health = jnp.asarray(arrays["health"], jnp.int32)
    params = {
        name: {
            "kernel": jnp.asarray(arrays[f"init/{name}.weight"].T),
            "bias": jnp.asarray(arrays[f"init/{name}.bias"]),
        }
        for name in ("backbone", "rul_head", "health_head")
    }

    def losses_fn(params):
        def linear(name, x):
            return x @ params[name]["kernel"] + params[name]["bias"]

        h = linear("backbone", x)
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(
            linear("health_head", h), health
        )
        return jnp.mean((linear("rul_head", h) - rul) ** 2), cross_entropy.mean()

    rate = 0.025 if canonical else 0.05
    guard = {"min_weight": None} if canonical else {}
    optimizer = optax.chain(record, optax.sgd(rate))
    tx = optax.chain(
        gradnorm(variant=variant, weight_optimizer=optimizer, **guard),
        optax.sgd(1e-2 if canonical else 1e-4),
    )

    def step(carry, _):
        params, opt_state = carry
        losses, grads = task_value_and_grad(losses_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params, task_losses=losses)
        learned = opt_state[0].weighting_state
        record = (
            losses,
            opt_state[0].task_norms * jnp.abs(opt_state[0].task_weights),
            opt_state[0].task_weights,
            learned.learned_weights,
            gradient_of(learned),
        )
        return (optax.apply_updates(params, updates), opt_state), record

    carry = params, tx.init(params)
    (params, _), actual = jax.lax.scan(step, carry, length=len(arrays["losses"]))
    names = ["losses", "weighted_norms", "weights_used", "weights_after", "weight_gradient"]
    for name, value in zip(names, actual, strict=True):
        np.testing.assert_allclose(value, arrays[name], rtol=1e-3, err_msg=name)
    for name, layer in params.items():
        expected = arrays[f"final/{name}.weight"].T
        np.testing.assert_allclose(layer["kernel"], expected, rtol=1e-3, atol=1e-5)
    if not canonical:  # the sign once a weight is negative
        np.testing.assert_allclose(actual[2][3, 0], -0.152, atol=1e-3)
        np.testing.assert_allclose(actual[4][3, 0], -7.7, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [[1.2, 0.7, 1.1], [0.9, -0.4, 2.5]])
@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_form_is_the_gradient_through_the_norms(variant, weights):
    """Against second-order autodiff: d/dw of the norms of gradients of weighted losses."""
    alpha, coefficient = 1.5, 0.3
    x = jax.random.normal(jax.random.key(0), (6, 4))
    trunk = jax.random.normal(jax.random.key(1), (4, 3))
    start, weights = jnp.array([2.0, 0.5, 1.0]), jnp.array(weights)

    def losses_fn(trunk):
        h = jnp.tanh(x @ trunk)
        return jnp.array([9.0, 1.0, 0.1]) * jnp.mean((h - 1) ** 2, axis=0)

    def objective(weights):
        gradients = jax.jacobian(lambda trunk: weights * losses_fn(trunk))(trunk)
        contributions = jnp.sqrt(jnp.sum(gradients**2, axis=(1, 2)))
        rates = losses_fn(trunk) / start
        if variant == "canonical":
            targets = jnp.mean(contributions) * (rates / jnp.mean(rates)) ** alpha
            targets = jax.lax.stop_gradient(targets)
        else:
            targets = jnp.mean(contributions) * rates**alpha
        return coefficient * jnp.sum(jnp.abs(contributions - targets))

    rule = weighting.gradnorm(
        3,
        alpha=alpha,
        coefficient=coefficient,
        variant=variant,
        weight_optimizer=optax.chain(record, optax.sgd(0.1)),
        initial_losses=start,
    )
    norms = jnp.sqrt(jnp.sum(jax.jacobian(losses_fn)(trunk) ** 2, axis=(1, 2)))
    state = rule.init()._replace(learned_weights=weights)
    _, state = rule.update(stats_of(norms, losses_fn(trunk)), state)
    np.testing.assert_allclose(gradient_of(state), jax.grad(objective)(weights), rtol=1e-5)


def test_published_weight_goes_negative_in_one_step_unless_guarded(weigh):
    make = functools.partial(weighting.gradnorm, 2, variant="published", coefficient=1.0)
    published = weigh(make(), [76.5335, 0.3665], 50, losses=jnp.ones(2))
    np.testing.assert_allclose(published[:2, 0], [1, -2.83], atol=5e-3)
    guarded = weigh(make(min_weight=1e-3), [76.5335, 0.3665], 50, losses=jnp.ones(2))
    assert guarded.min() == np.float32(1e-3)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([10, 1], [0.001996, 0.998004]),
        ([5, 1.5], [0.000385, 0.999615]),
        ([10, 0.5], [0.005625, 0.994375]),
    ],
)
def test_balance_points(losses, expected):
    point = weighting.gradnorm_balance_point([5, 0.01], losses, [20, 2], 1.5)
    np.testing.assert_allclose(point, expected, atol=5e-7)
    contributions = np.asarray(point) * [5, 0.01]
    targets = (np.array(losses) / [20, 2]) ** 1.5
    np.testing.assert_allclose(
        contributions / contributions.sum(), targets / targets.sum(), rtol=1e-5
    )


def test_equal_rates_balance_where_gaba_does(weigh):
    (closed_form,) = weigh(weighting.inverse_share(2), [5, 0.01])
    for losses, alpha in [([10, 1], 1.5), ([5, 1.5], 0.0)]:  # equal rates; or they do not count
        point = weighting.gradnorm_balance_point([5, 0.01], losses, [20, 2], alpha)
        np.testing.assert_allclose(point, closed_form, rtol=1e-6)


def test_balance_point_in_the_limits():
    point = weighting.gradnorm_balance_point
    np.testing.assert_array_equal(point([3.0, 0.0], [1.0, 1.0], [1.0, 1.0]), [0, 1])
    np.testing.assert_array_equal(point([3.0, 1.0], [0.0, 1.0], [1.0, 1.0]), [0, 1])
    np.testing.assert_array_equal(point([0.0, 0.0], [0.0, 0.0], [1.0, 1.0]), [0.5, 0.5])
    with pytest.raises(ValueError, match=r"must be \[K\].*\(2,\), \(3,\) and \(2,\)"):
        point([1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="alpha=-1"):
        point([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], -1)


@pytest.mark.parametrize(
    ("losses", "alpha", "reached"),
    [
        ([10.0, 1.0], 1.5, True),  # equal rates
        ([10.0, 0.5], 0.0, True),
        ([10.0, 0.5], 1.0, True),  # the mean of r is 1
        ([10.0, 0.5], 1.5, False),  # r = (4/3, 2/3): the mean of r^1.5 is 1.04
    ],
)
def test_the_iteration_reaches_the_balance_point_only_where_the_targets_add_up(
    weigh, losses, alpha, reached
):
    rates = np.array(losses) / [20, 2]
    assert np.isclose(np.mean((rates / rates.mean()) ** alpha), 1) == reached
    rule = weighting.gradnorm(
        2,
        alpha=alpha,
        weight_optimizer=optax.adam(optax.exponential_decay(0.025, 1000, 0.5)),
        initial_losses=[20.0, 2.0],
    )
    weights = weigh(rule, [5, 1], 10000, losses=jnp.array(losses))[-1]
    point = weighting.gradnorm_balance_point([5, 1], losses, [20, 2], alpha)
    distance = np.abs(weights / weights.sum() - point).max()
    assert distance < 1e-3 if reached else distance > 0.03


def test_a_slow_task_is_raised():
    """Rates (2, .5, .5): an inverted exponent would lower the first weight."""
    rule = weighting.gradnorm(
        3, weight_optimizer=optax.chain(record, optax.sgd(0.01)), initial_losses=jnp.ones(3)
    )
    _, state = rule.update(stats_of([10, 1, 1], [2, 0.5, 0.5]), rule.init())
    assert gradient_of(state)[0] == -10
    assert state.learned_weights[0] > 1.05


def test_equal_steps_of_adam_are_cancelled_by_rescaling(weigh):
    """The same tasks, all below their targets: the sign is right, and nothing moves."""
    rule = weighting.gradnorm(3, initial_losses=jnp.ones(3))
    weights = weigh(rule, [10, 1, 1], 5, losses=jnp.array([2.0, 0.5, 0.5]))
    np.testing.assert_allclose(weights, 1, atol=1e-5)


def test_learning_starts_with_the_second_update(weigh):
    weights = weigh(weighting.gradnorm(2), [5, 1], 3, losses=jnp.ones(2))
    np.testing.assert_allclose(weights, [[1, 1], [0.975, 1.025], [0.95, 1.05]], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "first", "least", "sum_"),
    [
        ({}, [1, 1], 1e-3, 2),
        ({"total": 1.0}, [0.5, 0.5], 1e-3, 1),
        ({"min_weight": None}, [1, 1], None, 2),
        ({"variant": "published"}, [1, 1], None, None),
        ({"variant": "published", "min_weight": 0.01}, [1, 1], 0.01, None),
        ({"variant": "published", "min_weight": 0.0}, [1, 1], 0.0, None),
        ({"variant": "published", "total": 1.0}, [0.5, 0.5], None, 1),
    ],
)
def test_what_is_given_wins(weigh, options, first, least, sum_):
    optimizer = optax.sgd(0.05)
    rule = weighting.gradnorm(2, coefficient=1.0, weight_optimizer=optimizer, **options)
    weights = weigh(rule, [30.0, 1.0], 40, losses=jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(weights[0], first)
    np.testing.assert_array_equal(rule.initial_weights, first)
    if sum_ is not None:
        largest = np.abs(weights).max()
        np.testing.assert_allclose(weights.sum(axis=1), sum_, rtol=1e-5, atol=1e-6 * largest)
    if least is None:
        assert weights.min() < 0
    elif sum_ is None:
        assert weights.min() == np.float32(least)
    else:
        assert weights.min() > 0


def test_initial_losses_are_latched_at_the_first_finite_update():
    tx = balance(weighting.gradnorm(2))
    params, grads = jnp.ones(2), jnp.array([[3.0, 4.0], [1.0, 0.0]])
    state, update, latched = tx.init(params), jax.jit(tx.update), []
    for losses in ([jnp.nan, 2.0], [4.0, 2.0], [1.0, 1.0]):
        _, state = update(grads, state, params, task_losses=jnp.array(losses))
        latched.append(state.weighting_state.initial_losses)
    np.testing.assert_array_equal(latched, [[0, 0], [4, 2], [4, 2]])


def test_given_initial_losses_stand():
    rule = weighting.gradnorm(2, initial_losses=[8.0, 3.0])
    _, state = rule.update(stats_of([1, 1], [4, 2]), rule.init())
    np.testing.assert_array_equal(state.initial_losses, [8, 3])


def test_an_absent_task_keeps_its_weight_and_the_means_are_over_the_others():
    make = functools.partial(weighting.gradnorm, weight_optimizer=optax.sgd(0.1))
    rule, pair = make(3, total=3.0), make(2, total=2.0)
    present = [True, False, True]
    _, state = rule.update(stats_of([4, 0, 1], [2, 1, 3], present), rule.init())
    _, alone = pair.update(stats_of([4, 1], [2, 3]), pair.init())
    np.testing.assert_array_equal(state.initial_losses, [2, 0, 3])
    _, state = rule.update(stats_of([4, 0, 1], [1, 1, 3], present), state)
    _, alone = pair.update(stats_of([4, 1], [1, 3]), alone)
    assert state.learned_weights[1] == 1
    np.testing.assert_allclose(state.learned_weights[::2], alone.learned_weights, rtol=1e-6)
    _, state = rule.update(stats_of([4, 1, 1], [1, 7, 3]), state)
    np.testing.assert_array_equal(state.initial_losses, [2, 7, 3])


@pytest.mark.parametrize("optimizer", [None, optax.sgd(0.1)], ids=["default", "sgd"])
@pytest.mark.parametrize("guard", [{}, {"min_weight": None}, {"min_weight": 0.0}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_stays_finite(variant, guard, optimizer):
    rule = weighting.gradnorm(2, variant=variant, weight_optimizer=optimizer, alpha=6.0, **guard)
    update, state = jax.jit(rule.update), rule.init()
    norms = [[0, 0], [1e38, 1e-38], [1e-30, 1e30], [0, 1], [1e38, 1e38], [1e-38, 1e-38]]
    losses = [[0, 1e-38], [-5, 1e38], [1e38, 0], [1e38, 1e38], [0, 0], [1e-38, 1]]
    masks = [[True, True], [True, False]]
    for i in range(6 * 6 * 2):
        stats = stats_of(norms[i % 6], losses[i // 6 % 6], masks[i // 36])
        weights, state = update(stats, state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((weights, state)))


def test_a_weight_of_zero_recovers(weigh):
    rule = weighting.gradnorm(2, min_weight=0.0, weight_optimizer=optax.sgd(0.1), alpha=0.0)
    weights = weigh(rule, [30.0, 10.0], 20, losses=jnp.ones(2))
    assert (weights[:-1, 0] == 0).any()
    assert not ((weights[:-1] == 0) & (weights[1:] == 0)).any()


def test_stabilize_bounds_what_is_applied(weigh):
    inner = weighting.gradnorm(2, variant="published")
    rule = weighting.stabilize(inner, beta=0.0, warmup_steps=2, min_weight=0.05, floor="project")
    weights = weigh(rule, [76.5, 0.4], 40, losses=jnp.array([3.0, 1.0]))
    assert weigh(inner, [76.5, 0.4], 38, losses=jnp.array([3.0, 1.0])).min() < 0
    np.testing.assert_array_equal(weights[:3], 0.5)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights.min(), 0.05, rtol=1e-6)


def test_initial_losses_are_latched_after_the_warm_up_of_stabilize():
    rule = weighting.stabilize(weighting.gradnorm(2), warmup_steps=2)
    state = rule.init()
    for step in range(1, 5):
        _, state = rule.update(stats_of([1, 1], [10.0 / step, 2]), state)
    np.testing.assert_allclose(state.inner_state.initial_losses, [10 / 3, 2])


def test_forgotten_losses_raise_when_the_step_is_traced(toy):
    losses_fn, params, batch = toy
    tx = optax.chain(gradnorm(), optax.sgd(1e-3))

    def step(params, opt_state):
        _, grads = task_value_and_grad(losses_fn)(params, *batch)
        return tx.update(grads, opt_state, params)

    remedy = r"needs the task losses: call tx.update\(.*task_losses=losses\)"
    with pytest.raises(ValueError, match=remedy):
        jax.jit(step).trace(params, tx.init(params))


def test_temporary_memory_is_that_of_gaba():
    width = 256
    params = {"trunk": [jnp.ones((width, width))] * 4, "a": jnp.ones(width), "b": jnp.ones(width)}

    def losses_fn(params, x):
        for kernel in params["trunk"]:
            x = jnp.tanh(x @ kernel)
        return jnp.mean((x @ params["a"] - 1) ** 2), jnp.mean((x @ params["b"]) ** 2)

    def temporary_bytes(balancing):
        tx = optax.chain(balancing, optax.adamw(1e-3))

        def step(params, opt_state, x):
            losses, grads = task_value_and_grad(losses_fn)(params, x)
            updates, opt_state = tx.update(grads, opt_state, params, task_losses=losses)
            return optax.apply_updates(params, updates), opt_state

        arguments = params, tx.init(params), jnp.ones((32, width))
        # Donated, or the buffers of the results would serve as temporary memory.
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours, gabas = temporary_bytes(gradnorm()), temporary_bytes(gaba())
    assert gabas > 1e6
    assert abs(ours - gabas) < 0.05 * gabas


def test_norms_on_one_layer():
    """``measure_on`` gives the original choice, the last shared layer."""
    params = {"first": jnp.ones(2), "last": jnp.ones(2), "head": jnp.ones(1)}
    grads = {
        "first": jnp.full((2, 2), 100.0),
        "last": jnp.array([[3.0, 4.0], [0.6, 0.8]]),
        "head": jnp.array([[1.0], [0.0]]),
    }
    tx = gradnorm(measure_on=only("last"))
    _, state = tx.update(grads, tx.init(params), params, task_losses=jnp.ones(2))
    np.testing.assert_allclose(state.task_norms, [5, 1], rtol=1e-6)


def test_numbers_can_be_injected():
    injected = optax.inject_hyperparams(
        gradnorm, static_args=("num_tasks",), hyperparam_dtype=jnp.float32
    )
    numbers = {"alpha": 1.0, "coefficient": 2.0, "min_weight": 0.1, "total": 1.0}
    others = {"weight_optimizer": optax.sgd(0.1)}
    params, grads = jnp.ones(2), jnp.array([[3.0, 4.0], [0.6, 0.8]])
    states = []
    for tx in (injected(**numbers, **others), gradnorm(**numbers, **others)):
        state, update = tx.init(params), jax.jit(tx.update)
        for losses in (jnp.array([1.0, 2.0]), jnp.array([1.0, 1.5])):
            _, state = update(grads, state, params, task_losses=losses)
        states.append(optax.tree.get(state, "learned_weights"))
    np.testing.assert_allclose(*states, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 1}, "num_tasks=1 must be at least 2"),
        ({"alpha": -0.5}, "alpha=-0.5 must be finite and at least 0"),
        ({"alpha": jnp.bfloat16(1.5)}, "alpha came as bfloat16"),
        ({"variant": "paper"}, 'variant=\'paper\' must be "canonical" or "published"'),
        ({"coefficient": 0.0}, "coefficient=0.0 must be positive and finite"),
        ({"total": -1.0}, "total=-1.0 must be positive and finite"),
        ({"min_weight": -0.1}, "min_weight=-0.1 must be finite and at least 0"),
        ({"min_weight": 0.6, "total": 1.0}, "min_weight=0.6 is too large: 2 weights"),
        ({"weight_optimizer": 0.025}, r"must be an optax optimizer.*got 0.025"),
        ({"initial_losses": [1.0]}, r"initial_losses must have shape \(2,\)"),
        ({"initial_losses": [1.0, 0.0]}, "initial_losses must be positive and finite"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        weighting.gradnorm(**{"num_tasks": 2, **arguments})
