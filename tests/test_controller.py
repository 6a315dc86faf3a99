"""The controller's view against the rules that it describes, and the loop that runs them."""

import functools
import json

import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import controller as study
from gaba_jax import balance, controller, weighting
from tests.slow import rest_slow

KINDS = {
    "float64": (np.ndarray, lambda x: np.asarray(x, np.float64)),
    "float32": (np.ndarray, lambda x: np.asarray(x, np.float32)),
    "jax": (jax.Array, lambda x: jnp.asarray(x, jnp.float32)),
}
PER_TASK = ["share", "error", "control", "saturation", "steady_state"]
OF_BETA = ["time_constant", "half_life"]

norms_of_tasks = st.integers(2, 10).flatmap(
    lambda k: hypothesis.extra.numpy.arrays(
        np.float64, k, elements=st.just(0.0) | st.floats(1e-3, 1e3)
    )
)


@functools.cache
def rule_for(name, num_tasks, **options):
    """The first answer of a rule, compiled."""
    rule = getattr(weighting, name)(num_tasks, **options)

    @jax.jit
    def weigh(norms):
        stats = weighting.TaskStats(norms, None, None, jnp.ones(num_tasks, bool), jnp.int32(1))
        return rule.update(stats, rule.init())[0]

    return lambda norms: weigh(jnp.asarray(norms, jnp.float32))


@settings(max_examples=60)
@given(norms=norms_of_tasks)
def test_the_closed_form_is_proportional_control_for_any_k(norms):
    num_tasks = len(norms)
    errors = controller.error(norms)
    np.testing.assert_allclose(errors.sum(), 0, atol=1e-15)
    np.testing.assert_allclose(controller.share(norms), 1 / num_tasks - errors, atol=1e-16)
    weights = controller.control(norms)
    np.testing.assert_allclose(weights, rule_for("inverse_share", num_tasks)(norms), atol=2e-7)
    total = norms.sum()
    if total > 0:  # the formula itself, to the precision of NumPy
        closed = np.array([np.delete(norms, i).sum() for i in range(num_tasks)])
        np.testing.assert_allclose(weights, closed / ((num_tasks - 1) * total), atol=1e-15)


def test_published_numbers():
    norms = np.array([250.0, 0.5])
    np.testing.assert_allclose(controller.share(norms), [0.998004, 0.001996], atol=5e-7)
    np.testing.assert_allclose(controller.error(norms), [-0.498004, 0.498004], atol=5e-7)
    np.testing.assert_allclose(controller.control(norms), [0.001996, 0.998004], atol=5e-7)
    np.testing.assert_allclose(controller.saturation([0.002, 0.998]), [0.0477, 0.9523], atol=5e-5)
    assert [controller.gain(k) for k in (2, 3, 11)] == [1, 0.5, 0.1]


def test_a_proportional_controller_leaves_an_error_for_three():
    norms = np.array([1, 1, 1e-3])
    contributions = controller.control(norms) * norms
    np.testing.assert_allclose(contributions, [0.25, 0.25, 0.0005], rtol=2e-3)
    assert np.max(np.abs(controller.error(contributions))) > 0.33
    pair = norms[1:]
    np.testing.assert_allclose(controller.error(controller.control(pair) * pair), 0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_shares_of_extreme_norms(scale):
    np.testing.assert_allclose(controller.share(np.array([1.0, 3.0]) * scale), [0.25, 0.75])
    np.testing.assert_array_equal(controller.share([0, 0, 0, 0]), 0.25)
    assert np.isnan(controller.share([1.0, np.nan])).all()


@pytest.mark.parametrize(("kind", "convert"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", PER_TASK)
def test_the_kind_that_came_goes_out_and_other_axes_stay(name, kind, convert):
    function = getattr(controller, name)
    batch = convert([[1.0, 2.0, 7.0], [0.1, 0.1, 0.1]])
    result = function(batch)
    assert isinstance(result, kind)
    assert result.dtype == batch.dtype
    np.testing.assert_allclose(result[0], function(batch[0]), rtol=1e-6)
    np.testing.assert_allclose(result[1], 0 if name == "error" else 1 / 3, atol=1e-6)


@pytest.mark.parametrize("name", rest_slow(PER_TASK, fast=["share", "saturation"]))
def test_under_jit_vmap_and_grad(name):
    function = getattr(controller, name)
    batch = jnp.array([[1.0, 2.0, 7.0], [300.0, 1.0, 0.2]])
    expected = function(np.asarray(batch))
    np.testing.assert_allclose(jax.jit(function)(batch), expected, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(function)(batch), expected, atol=1e-6)
    jacobian = jax.jacobian(function)(batch[0])
    direction = np.array([0.3, -0.2, 0.1])
    nearby = [function(np.asarray(batch[0]) + h * direction) for h in (1e-2, -1e-2)]
    np.testing.assert_allclose(jacobian @ direction, (nearby[0] - nearby[1]) / 2e-2, atol=1e-4)


@pytest.mark.parametrize("debias", [False, True])
def test_the_average_is_a_first_order_low_pass_filter(debias):
    """After a jump of the norms, the weights of the real rule are the step response."""
    rule = weighting.gaba(3, beta=0.9, warmup_steps=0, min_weight=0.0, debias=debias)
    before, after = np.array([1.0, 1.0, 2.0]), np.array([500.0, 3.0, 1.0])
    norms = np.concatenate([np.tile(before, (200, 1)), np.tile(after, (40, 1))])
    loop = controller.simulate(norms, rule)
    expected = controller.step_response(
        np.arange(1, 41)[:, None],
        start=loop.weights[199],
        target=controller.control(after),
        beta=0.9,
    )
    np.testing.assert_allclose(loop.weights[200:], expected, atol=2e-6)


def test_times_of_the_filter():
    np.testing.assert_allclose(controller.time_constant(0.99), 99.499, atol=1e-3)
    np.testing.assert_allclose(controller.half_life(0.99), 68.968, atol=1e-3)
    for name, left in [("time_constant", np.exp(-1)), ("half_life", 0.5)]:
        t = getattr(controller, name)(np.array([0.5, 0.9, 0.999]))
        np.testing.assert_allclose(
            controller.step_response(t, start=1.0, target=0.0, beta=[0.5, 0.9, 0.999]), left
        )
        assert getattr(controller, name)(0.0) == 0


@settings(max_examples=60)
@given(beta=st.floats(0, 0.9999), tolerance=st.floats(1e-6, 0.999))
def test_settling_steps_is_the_first(beta, tolerance):
    steps = controller.settling_steps(beta, tolerance=tolerance)
    assert steps >= 1
    assert beta ** int(steps) <= tolerance * (1 + 1e-9)
    assert steps == 1 or beta ** (int(steps) - 1) > tolerance


def test_settling_steps_of_round_numbers():
    """2 log 2 / log 2 is above 2 in floats or not: the answer is 2."""
    betas = np.array([0.5, 0.5**0.5, 0.0, 0.99])
    np.testing.assert_array_equal(controller.settling_steps(betas, tolerance=0.25), [2, 4, 1, 138])
    assert controller.settling_steps(betas).dtype == int
    assert controller.settling_steps(jnp.float32(0.99)) == 390


@pytest.mark.parametrize("name", [*OF_BETA, "settling_steps"])
def test_filters_of_each_kind(name):
    function = getattr(controller, name)
    for kind, convert in KINDS.values():
        betas = convert([0.0, 0.9, 0.99])
        result = function(betas)
        assert isinstance(result, kind)
        np.testing.assert_allclose(result, function(np.array([0, 0.9, 0.99])), rtol=1e-5)
        if name in OF_BETA:
            assert result.dtype == betas.dtype
    np.testing.assert_allclose(jax.jit(function)(0.9), function(0.9), rtol=1e-5)
    if name in OF_BETA:  # d(-1/log b)/db = 1/(b log(b)^2)
        slope = (1 if name == "time_constant" else np.log(2)) / (0.9 * np.log(0.9) ** 2)
        np.testing.assert_allclose(jax.grad(function)(0.9), slope, rtol=1e-4)
        assert np.isfinite(jax.grad(function)(0.0))


def test_the_step_response_keeps_the_kind():
    response = functools.partial(controller.step_response, start=0.5, target=1.0)
    assert response(np.arange(3)).dtype == np.float64
    assert isinstance(response(jnp.arange(3)), jax.Array)
    assert isinstance(controller.step_response(2, start=jnp.ones(3), target=0.0), jax.Array)
    np.testing.assert_allclose(jax.jit(response)(jnp.arange(3)), response(np.arange(3)), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("floor", rest_slow(["renormalize", "project"], fast=["project"]))
@settings(max_examples=40)
@given(norms=norms_of_tasks, part=st.floats(0, 1))
def test_steady_state_is_where_the_loop_ends(floor, norms, part):
    least = part / len(norms)
    narrow = jnp.asarray(norms, jnp.float32)
    end, state, saturated = ends(len(norms), floor)(narrow, jnp.float32(least))
    np.testing.assert_allclose(end, state, atol=2e-6)
    np.testing.assert_allclose(saturated, state, atol=2e-6)
    np.testing.assert_allclose(state.sum(), 1, rtol=1e-6)
    bound = least if floor == "project" else least / (1 + (len(norms) - 1) * least)
    assert np.all(state >= bound - 1e-7)


@functools.cache
def ends(num_tasks, floor):
    """The last weights of a loop, and two ways to foretell them: compiled once per K."""

    @jax.jit
    def run(norms, least):
        limit = {"min_weight": least, "floor": floor}
        rule = weighting.gaba(num_tasks, beta=0.8, warmup_steps=5, **limit)
        end = controller.simulate(norms, rule, steps=100).weights[-1]
        saturated = controller.saturation(controller.control(norms), **limit)
        return end, controller.steady_state(norms, **limit), saturated

    return run


def test_the_loop_is_that_of_training():
    """Against optax updates on gradients of those norms, NaN and zeros among them."""
    norms = np.exp(np.random.default_rng(0).normal(size=(30, 3))).astype(np.float32) * [100, 1, 0.1]
    norms[7, 1], norms[11], norms[20, 2] = np.nan, 0, np.inf
    for name, options in [("gaba", {"warmup_steps": 3}), ("proportional_integral", {})]:
        rule = getattr(weighting, name)(3, **options)
        tx = balance(rule, shared=True)

        def step(state, g, tx=tx):
            _, state = tx.update(g[:, None], state)
            return state, state.task_weights

        _, expected = jax.lax.scan(step, tx.init(jnp.zeros(1)), jnp.asarray(norms, jnp.float32))
        loop = controller.simulate(norms, rule)
        np.testing.assert_allclose(loop.weights, expected, rtol=1e-5)
        np.testing.assert_array_equal(loop.weights[7], loop.weights[6])
        assert np.isfinite(loop.weights).all()


def test_what_a_simulation_returns():
    norms = np.array([[1.0, 3.0], [2.0, 2.0]])
    loop = controller.simulate(norms, weighting.inverse_share(2))
    np.testing.assert_allclose(loop.weights, [[0.75, 0.25], [0.5, 0.5]], rtol=1e-6)
    np.testing.assert_array_equal(loop.norms, norms)
    np.testing.assert_allclose(loop.shares, [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(loop.contributions, [[0.75, 0.75], [1, 1]], rtol=1e-6)
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float64 for x in loop)
    loop = controller.simulate(jnp.asarray(norms))
    assert all(isinstance(x, jax.Array) for x in loop)
    np.testing.assert_array_equal(loop.weights, 0.5)  # the default is gaba, in its warm-up
    constant = controller.simulate([1.0, 3.0], weighting.inverse_share(2), steps=4)
    np.testing.assert_allclose(constant.weights, np.tile([0.75, 0.25], (4, 1)), rtol=1e-6)


def test_a_plant_answers_to_the_weights_applied_before():
    def plant(weights):
        return jnp.array([4.0, 1.0]) * weights

    loop = controller.simulate(plant, weighting.inverse_norm(2), steps=3)
    weights, expected = np.array([0.5, 0.5]), []
    for _ in range(3):
        norms = np.array([4.0, 1.0]) * weights
        weights = 1 / norms / np.sum(1 / norms)
        expected.append((weights, norms))
    np.testing.assert_allclose(loop.weights, [w for w, _ in expected], rtol=1e-5)
    np.testing.assert_allclose(loop.norms, [g for _, g in expected], rtol=1e-5)
    assert controller.simulate(plant, steps=2).weights.shape == (2, 2)


def test_a_plant_with_a_memory():
    """Two quadratics under gradient descent: what is left of each is its gradient's norm."""
    rates = jnp.array([0.5, 0.1])

    def plant(weights, left):
        left = left * (1 - rates * weights)
        return left, left

    start = jnp.array([10.0, 1.0])
    loop = controller.simulate(plant, weighting.uniform(2), steps=20, plant_state=start)
    expected = np.array([10, 1]) * np.array([0.75, 0.95]) ** np.arange(1, 21)[:, None]
    np.testing.assert_allclose(loop.norms, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: controller.share(3.0), r"at least two tasks; got shape \(\)"),
        (lambda: controller.control([[1.0], [2.0]]), r"norms must .* got shape \(2, 1\)"),
        (lambda: controller.saturation([1.0]), r"weights must .* got shape \(1,\)"),
        (lambda: controller.saturation([1.0, 1.0], min_weight=0.6), "the most is 0.5"),
        (lambda: controller.steady_state([1.0, 1.0], floor="clamp"), "floor='clamp' must be"),
        (lambda: controller.error([1.0, -1.0]), r"norms must be at least 0, got \[ 1. -1.\]"),
        (lambda: controller.simulate(np.ones(2), steps=0), "steps=0 must be a positive integer"),
        (lambda: controller.gain(1), "num_tasks=1 must be at least 2"),
        (lambda: controller.time_constant(1.0), r"beta=1.0 must be in \[0, 1\)"),
        (lambda: controller.half_life([0.5, -0.1]), r"must be in \[0, 1\)"),
        (lambda: controller.settling_steps(0.9, tolerance=0.0), "tolerance=0.0 must be between"),
        (lambda: controller.step_response(1, start=0, target=1, beta=2.0), "beta=2.0"),
        (lambda: controller.simulate(lambda w: w), "steps is missing"),
        (lambda: controller.simulate([1.0, 2.0]), r"constant \[K\] with steps; got shape \(2,\)"),
        (lambda: controller.simulate(np.ones((5, 2)), steps=5), "without steps"),
        (lambda: controller.simulate(np.ones((5, 2, 2))), r"got shape \(5, 2, 2\)"),
        (
            lambda: controller.simulate(np.ones((5, 2)), weighting.gaba(3)),
            r"must be 3 wide.*got shape \(5, 2\)",
        ),
        (lambda: controller.simulate(lambda w: w[:1], steps=3), r"returned shape \(1,\)"),
        (lambda: controller.simulate(np.ones((5, 2)), weighting.mgda(2)), r"needs \['cosines'\]"),
        (lambda: controller.simulate(np.ones((5, 2)), weighting.gaba), "Call the rule first"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_jitted_simulation_traces_once():
    traces = 0

    @jax.jit
    def last(norms):
        nonlocal traces
        traces += 1
        return controller.simulate(norms, weighting.gaba(2, warmup_steps=0)).weights[-1]

    for scale in (1.0, 2.0):
        np.testing.assert_allclose(last(jnp.full((3, 2), scale)), 0.5, rtol=1e-6)
    assert traces == 1


@pytest.mark.slow
def test_what_the_study_says_of_the_loops_is_so():
    """Recomputed here; its training runs take too long for a test."""
    result = json.loads(study.RESULT.read_text())
    assert result["windup"] == study.windup()
    assert list(result["loops"]) == list(study.methods(3))
    assert list(result["digits"]) == list(study.TRAINED)
    rule = study.methods(3)["proportional_integral"]
    found = study.step_and_noise(rule) | study.finished_task(rule)
    for key, value in result["loops"]["proportional_integral"].items():
        np.testing.assert_allclose(found[key], value, rtol=1e-3)
    # As docs/benchmarks.md says of the digits.
    means = {
        scale: {
            name: np.mean(each["accuracies"][scale], axis=1)
            for name, each in result["digits"].items()
        }
        for scale in study.SCALES
    }
    apart, equal = means["apart"], means["equal"]
    rule = apart.pop("proportional_integral")
    assert np.all(rule > apart["uniform"])
    assert 0.02 < np.mean(rule - apart["uniform"]) < np.mean(rule - apart["inverse_norm"])
    assert all(np.mean(rule - other) > 0.01 for other in apart.values())
    assert np.mean(apart["the same from 1/K"]) < 0.6
    assert max(equal, key=lambda name: np.mean(equal[name])) == "uniform"
    data = study.toy.overlay_digits(partners=1)
    accuracies, departures = study.classify(study.methods(4)["gaba, debiased"], data, (0, 1), 1)
    assert accuracies.shape == (2, 2, 4)
    assert np.all((accuracies > 0) & (accuracies < 1))
    assert np.all(departures > 0)
