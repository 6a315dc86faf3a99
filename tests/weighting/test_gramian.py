"""The Gramian rules: golden directions, optimality conditions, guarantees on made-up Jacobians."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaba_jax import weighting
from gaba_jax.weighting import TaskStats
from gaba_jax.weighting._solvers import eigen
from tests.slow import rest_slow, rest_slow_of_several

# Golden array -> rule; what an exact solver gave, and what an iterative one did.
EXACT = {
    "mgda": "mgda",
    "dualproj": "dual_projection",
    "upgrad": "upgrad",
    "imtl_g": "imtl_g",
    "aligned_mtl": "aligned_mtl",
    "config_direction": "config",
}
ITERATIVE = {
    "cagrad_c0.5": "cagrad",
    "fairgrad_alpha1": "nash_mtl",
    "fairgrad_alpha2": "fairgrad",
}
RULES = {
    name: getattr(weighting, name)
    for name in (
        "aligned_mtl",
        "cagrad",
        "config",
        "dual_projection",
        "fairgrad",
        "gradvac",
        "imtl_g",
        "mgda",
        "nash_mtl",
        "pcgrad",
        "upgrad",
    )
}
IN_RANDOM_ORDER = ("gradvac", "pcgrad")
CASES = [
    f"k{k}_{kind}" for k in (2, 3, 5, 8) for kind in ("random", "conflict", "imbalanced", "aligned")
]
OFTEN = [name for name in CASES if name.startswith("k3")]


def measured(jacobian, present=None):
    """What balance would measure on these gradients, in float32."""
    jacobian = np.asarray(jacobian, float)
    present = np.ones(len(jacobian), bool) if present is None else np.asarray(present)
    norms = np.where(present, np.linalg.norm(jacobian, axis=1), 0)
    unit = np.where(norms > 0, 1 / np.where(norms > 0, norms, 1), 0)[:, None] * jacobian
    cosines = np.where(np.eye(len(norms), dtype=bool), 1, unit @ unit.T)
    stats = (norms, np.clip(cosines, -1, 1))
    return TaskStats(
        *(jnp.asarray(x, jnp.float32) for x in stats), None, jnp.asarray(present), jnp.int32(1)
    )


@functools.cache
def compiled(name, num_tasks):
    rule = RULES[name](num_tasks)
    return jax.jit(lambda stats: rule.update(stats, rule.init()))


def solve(name, jacobian, present=None):
    """(weights as float64, state)."""
    weights, state = compiled(name, len(jacobian))(measured(jacobian, present))
    return np.asarray(weights, float), state


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def case(golden):
    arrays = golden("weightings")

    def of(name):
        prefix = f"{name}/"
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    return of


@pytest.mark.parametrize("name", rest_slow(CASES, fast=OFTEN))
def test_golden_directions(case, name):
    arrays = case(name)
    jacobian = arrays["jacobian"]
    for rules, tolerance in ((EXACT, 1e-4), (ITERATIVE, 1e-2)):
        for array, rule in rules.items():
            expected = arrays[array] if array == "config_direction" else arrays[array] @ jacobian
            weights, _ = solve(rule, jacobian)
            assert relative_error(weights @ jacobian, expected) < tolerance, rule


@pytest.mark.parametrize("name", rest_slow(CASES, fast=OFTEN))
def test_golden_cases_meet_their_optimality_conditions(case, name):
    """In float64, on the golden Gramian: what was solved in float32 is the optimum."""
    arrays = case(name)
    jacobian, gramian = arrays["jacobian"], arrays["gramian"]
    norms = np.linalg.norm(jacobian, axis=1)
    weights, state = solve("nash_mtl", jacobian)
    np.testing.assert_allclose(weights * (gramian @ weights), 1, rtol=2e-5)
    assert state.residual < 2e-5
    weights, state = solve("fairgrad", jacobian)
    np.testing.assert_allclose(gramian @ weights * np.sqrt(weights), 1, rtol=2e-5)
    assert state.residual < 2e-5

    weights, state = solve("mgda", jacobian)  # |d|^2 <= <d, g_i>
    length = np.linalg.norm(weights @ jacobian)
    assert np.min(gramian @ weights - length**2) > -1e-5 * length**2
    assert state.residual < 1e-6

    for rule in ("upgrad", "dual_projection"):
        weights, state = solve(rule, jacobian)
        cosines = jacobian @ (weights @ jacobian) / norms / np.linalg.norm(weights @ jacobian)
        assert cosines.min() > -1e-6, rule
        assert state.residual < 1e-6
    weights, _ = solve("dual_projection", jacobian)  # complementary: raised only if it binds
    raised = weights - 1 / len(norms) > 1e-5
    np.testing.assert_allclose(cosines[raised], 0, atol=1e-6)

    weights, state = solve("cagrad", jacobian)
    mean, theirs = jacobian.mean(axis=0), arrays["cagrad_c0.5"] @ jacobian
    ours = weights @ jacobian
    radius = np.linalg.norm(mean) / 2
    assert np.linalg.norm(ours - mean) <= radius * (1 + 1e-5)
    gain, their_gain = (np.min(jacobian @ direction) for direction in (ours, theirs))
    slack = 1e-5 * np.abs(jacobian @ theirs).max()
    assert gain >= their_gain - slack
    # The dual bound: no direction within the radius gains more.
    mix = (weights - 1 / len(norms)) / np.sum(weights - 1 / len(norms))
    bound = mean @ (mix @ jacobian) + radius * np.linalg.norm(mix @ jacobian)
    assert gain <= bound + slack
    assert bound - gain < 1e-4 * abs(bound) + slack
    assert state.residual < 2e-6


def test_a_solver_that_regularises_opposes_a_task(case):
    """The published figure, and ours: the cosine with the task that is worst off."""
    arrays = case("k5_imbalanced")
    jacobian = arrays["jacobian"]

    def worst(weights):
        direction = weights @ jacobian
        gains = jacobian @ direction / np.linalg.norm(jacobian, axis=1)
        return np.min(gains) / np.linalg.norm(direction)

    assert worst(arrays["upgrad_torchjd"]) == pytest.approx(-0.31, abs=0.005)
    assert worst(solve("upgrad", jacobian)[0]) > -1e-6


def test_nash_where_the_host_solver_did_not_converge(case):
    arrays = case("k3_imbalanced")
    gramian, jacobian = arrays["gramian"], arrays["jacobian"]
    weights, *_ = np.linalg.lstsq(jacobian.T, arrays["nash_mtl"], rcond=None)
    theirs = weights * (gramian @ weights)
    assert np.max(np.abs(theirs / theirs.mean() - 1)) > 0.5  # should all be the same
    weights, _ = solve("nash_mtl", jacobian)
    np.testing.assert_allclose(weights * (gramian @ weights), 1, rtol=1e-5)


@st.composite
def jacobians(draw, sizes=(2, 3, 5)):
    """Of any rank and scale, with rows that are zero, duplicated or opposed."""
    num_tasks = draw(st.sampled_from(sizes))
    rank = draw(st.integers(1, num_tasks))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = random.normal(size=(num_tasks, rank)) @ random.normal(size=(rank, 12))
    rows *= 10 ** (draw(st.sampled_from([0.0, 2.0, 4.0])) * random.uniform(size=(num_tasks, 1)))
    kind = draw(st.sampled_from(["plain", "zero", "same", "opposed"]))
    factor = {"plain": None, "zero": 0.0, "same": 1.0, "opposed": -1.0}[kind]
    if factor is not None:
        rows[draw(st.integers(1, num_tasks - 1))] = factor * rows[0]
    return rows * 10.0 ** draw(st.integers(-10, 15))


def conditioning(jacobian):
    """Least eigenvalue of the cosines; 0 with a zero row."""
    stats = measured(jacobian)
    least = np.linalg.eigvalsh(np.asarray(stats.cosines, float))[0]
    return max(least, 0) if np.all(np.asarray(stats.norms) > 0) else 0


def gains(weights, jacobian):
    """Of the direction along each unit gradient, over the sum of all contributions."""
    norms = np.linalg.norm(jacobian, axis=1)
    unit = jacobian / np.where(norms > 0, norms, 1)[:, None]
    contributions = weights * norms
    return unit @ (contributions @ unit) / np.sum(np.abs(contributions))


@pytest.mark.slow
@pytest.mark.parametrize("name", rest_slow(RULES, fast=["aligned_mtl", "mgda", "pcgrad"]))
@given(jacobian=jacobians())
def test_finite_and_equivariant(name, jacobian):
    weights, state = solve(name, jacobian)
    assert np.all(np.isfinite(weights))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    order = np.roll(np.arange(len(jacobian)), 1)
    if name not in IN_RANDOM_ORDER and conditioning(jacobian) > 1e-2:
        permuted, _ = solve(name, jacobian[order])
        norms = np.linalg.norm(jacobian, axis=1)
        size = np.max(np.abs(weights * norms))
        np.testing.assert_allclose(
            permuted * norms[order] / size, (weights * norms)[order] / size, atol=2e-4
        )


@given(jacobian=jacobians())
def test_projections_oppose_no_task(jacobian):
    for name in ("upgrad", "dual_projection"):
        weights, state = solve(name, jacobian)
        assert np.all(weights >= (1 - 1e-6) / len(weights)), name
        assert state.residual < 1e-5
        if np.any(jacobian):
            assert np.min(gains(weights, jacobian)) > -1e-5, name


def weakly_stationary(random, num_tasks=20, columns=100):
    """Of rank K - 1: some v >= 0 has v @ J = 0, and some direction improves the other tasks."""
    first = random.permutation(num_tasks) < random.integers(2, num_tasks)
    size = np.abs(random.normal(size=num_tasks))
    rows = np.stack([np.where(first, size, 0), np.where(first, 0, size)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    left = np.linalg.qr(np.column_stack([*rows, random.normal(size=(num_tasks, num_tasks - 2))]))[0]
    left[:, 1] = rows[1]
    right = np.linalg.qr(random.normal(size=(columns, columns)))[0][: num_tasks - 1]
    return left[:, 1:] * np.abs(random.normal(size=num_tasks - 1)) @ right


# Forty tasks: so many that the projections are first tried by products of matrices.
@pytest.mark.parametrize(
    ("name", "num_tasks"),
    rest_slow_of_several(
        [("upgrad", 20), ("dual_projection", 20), ("upgrad", 40)], fast=[("dual_projection", 20)]
    ),
)
def test_projections_of_weakly_stationary_gradients(name, num_tasks):
    """Long weights would cancel here to leave rounding, and the rounding would be the update."""
    random = np.random.default_rng(0)
    for _ in range(40):
        jacobian = weakly_stationary(random, num_tasks).astype(np.float32).astype(float)
        norms = np.linalg.norm(jacobian, axis=1)
        weights, state = solve(name, jacobian)
        direction = weights @ jacobian
        length = np.linalg.norm(direction)
        if length > 1e-3 * norms.mean():
            assert np.min(jacobian @ direction / norms) > -1e-3 * length
        assert np.max(weights * num_tasks) < 1e4
        # The residual tells: no task is opposed by more than it says of the gradients' sizes.
        sizes = np.max(norms) if name == "dual_projection" else np.mean(norms)
        assert np.min(jacobian @ direction / norms) > -(1.1 * state.residual + 1e-5) * sizes


@given(jacobian=jacobians())
def test_mgda_is_the_shortest_combination(jacobian):
    weights, state = solve("mgda", jacobian)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
    assert state.residual < 1e-5
    norms = np.linalg.norm(jacobian, axis=1)
    direction = weights @ jacobian / np.min(norms) if np.all(norms) else weights @ jacobian
    unit = jacobian / np.where(norms > 0, norms, 1)[:, None]
    # <d, u_i> >= |d|^2 / |g_i|, in units of the smallest norm
    wanted = np.dot(direction, direction) * np.min(norms) / np.where(norms > 0, norms, 1)
    assert np.min(unit @ direction - wanted) > -2e-3


@pytest.mark.parametrize("seed", [158, 183, 1374, 5890])
def test_mgda_of_opposed_gradients_beside_others_of_any_scale(seed):
    """A direction without curvature may first end at a variable that has no part in it."""
    random = np.random.default_rng(seed)
    jacobian = random.normal(size=(5, 12)) * 10.0 ** random.uniform(0, 4, size=(5, 1))
    jacobian[2] = -jacobian[0]
    weights, state = solve("mgda", jacobian)
    assert state.residual < 1e-6
    norms = np.linalg.norm(jacobian, axis=1)
    assert np.linalg.norm(weights @ jacobian) < 1e-6 * np.max(norms)  # the weights are float32


@given(jacobian=jacobians())
def test_stationarity_where_there_is_a_solution(jacobian):
    least = conditioning(jacobian)
    if least < 1e-2:
        return
    gramian = jacobian @ jacobian.T
    weights, state = solve("nash_mtl", jacobian)
    np.testing.assert_allclose(weights * (gramian @ weights), 1, rtol=1e-3)
    assert state.residual < 1e-3
    weights, _ = solve("fairgrad", jacobian)
    np.testing.assert_allclose(gramian @ weights * np.sqrt(weights), 1, rtol=5e-3)
    unit_gains = gains(solve("config", jacobian)[0], jacobian)
    np.testing.assert_allclose(unit_gains, unit_gains[0], rtol=1e-3)
    weights, _ = solve("aligned_mtl", jacobian)
    left, values, _ = np.linalg.svd(jacobian, full_matrices=False)
    expected = values[-1] * (left / values) @ left.T @ np.full(len(left), 1 / len(left))
    norms = np.linalg.norm(jacobian, axis=1)
    size = np.max(np.abs(expected * norms))
    np.testing.assert_allclose(weights * norms / size, expected * norms / size, atol=1e-3)
    weights, _ = solve("imtl_g", jacobian)
    np.testing.assert_allclose(np.sum(weights), 1, atol=1e-5 * np.sum(np.abs(weights)))
    projections = gains(weights, jacobian)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-3)


@given(jacobian=jacobians())
def test_cagrad_stays_within_its_radius_and_gains(jacobian):
    weights, _ = solve("cagrad", jacobian)
    mean = jacobian.mean(axis=0)
    size = np.sum(np.abs(weights) * np.linalg.norm(jacobian, axis=1))
    direction = weights @ jacobian
    assert np.linalg.norm(direction - mean) <= 0.5 * np.linalg.norm(mean) + 1e-5 * size
    norms = np.linalg.norm(jacobian, axis=1)
    assert np.min(jacobian @ direction) >= np.min(jacobian @ mean) - 1e-5 * size * np.max(norms)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_one_task_and_no_gradients(name):
    weights, _ = solve(name, np.array([[3.0, 4.0]]))
    np.testing.assert_allclose(weights, [1], rtol=1e-6)
    for num_tasks in (1, 5):
        weights, _ = solve(name, np.zeros((num_tasks, 3)))
        np.testing.assert_allclose(weights, RULES[name](num_tasks).initial_weights, rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_an_absent_task_is_as_if_it_were_not_there(name):
    """For the others: the weights of three tasks of which one is absent, and those of two."""
    jacobian = np.random.default_rng(3).normal(size=(3, 8)) * [[1.0], [50.0], [1.0]]
    jacobian[2] -= 0.1 * jacobian[0]
    others = [0, 2]
    weights, _ = solve(name, jacobian, present=[True, False, True])
    expected, _ = solve(name, jacobian[others])
    ratio = weights[others] / expected  # those present, and the absent one, share their sum
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert np.isfinite(weights[1])


@pytest.mark.parametrize("name", ["upgrad", "dual_projection", "cagrad", "config", "aligned_mtl"])
def test_priorities(name):
    rule = getattr(weighting, name)
    stats = measured(np.random.default_rng(0).normal(size=(3, 30)))
    same = rule(3, task_priorities=[2.0, 2.0, 2.0])
    np.testing.assert_allclose(
        same.update(stats, same.init())[0], rule(3).update(stats, rule(3).init())[0], rtol=1e-6
    )
    first = rule(3, task_priorities=[8.0, 1.0, 1.0])
    more, less = (np.asarray(r.update(stats, r.init())[0]) for r in (first, same))
    assert more[0] / more[1:].sum() > 1.5 * less[0] / less[1:].sum()
    with pytest.raises(ValueError, match="task_priorities must be positive"):
        rule(3, task_priorities=[1.0, 0.0, 1.0])


def test_imtl_g_of_opposed_gradients_is_the_limit():
    """Also where the cosine is -1 to the last bit: weights in inverse ratio to the norms."""
    for angle in (1e-2, 1e-3, 1e-4, 0.0):
        weights, _ = solve("imtl_g", np.array([[1.0, 0.0], [-10.0, 10 * angle]]))
        np.testing.assert_allclose(weights, [10 / 11, 1 / 11], rtol=1e-3)


def turned_by_hand(jacobian, orders):
    """PCGrad on the gradients themselves."""
    turned = jacobian.copy()
    for i, order in enumerate(orders):
        for j in order:
            product = turned[i] @ jacobian[j]
            if product < 0:
                turned[i] -= product / (jacobian[j] @ jacobian[j]) * jacobian[j]
    return turned.sum(axis=0)


def test_pcgrad_is_one_of_the_orders_and_not_always_the_same():
    jacobian = np.array([[1.0, 0.0], [-10.0, 10.0], [-0.1, -0.2]])  # all oppose each other
    each = [list(itertools.permutations({0, 1, 2} - {i})) for i in range(3)]
    expected = np.array([turned_by_hand(jacobian, orders) for orders in itertools.product(*each)])
    rule, met = weighting.pcgrad(3, seed=5), set()
    state, update = rule.init(), jax.jit(rule.update)
    for _ in range(20):
        weights, state = update(measured(jacobian), state)
        errors = np.linalg.norm(np.asarray(weights) @ jacobian - expected, axis=1)
        assert errors.min() < 1e-5 * np.linalg.norm(expected[0])
        met.add(int(errors.argmin()))
    assert len(met) > 1


def test_gradvac_by_hand():
    """Two tasks, where the order does not matter, over three updates."""
    beta, usual = 0.3, np.zeros((2, 2))
    rule = weighting.gradvac(2, beta=beta)
    state, random = rule.init(), np.random.default_rng(2)
    for _ in range(3):
        jacobian = random.normal(size=(2, 5)) * [[30.0], [1.0]]
        weights, state = rule.update(measured(jacobian), state)
        expected = np.zeros(5)
        for i, j in ((0, 1), (1, 0)):
            mine, other = jacobian[i], jacobian[j]
            length, theirs = np.linalg.norm(mine), np.linalg.norm(other)
            cosine, goal = mine @ other / length / theirs, usual[i, j]
            if cosine < goal:
                sines = np.sqrt(1 - np.array([cosine, goal]) ** 2)
                mine = (
                    mine
                    + length * (goal * sines[0] - cosine * sines[1]) / (theirs * sines[1]) * other
                )
                reached = mine @ other / np.linalg.norm(mine) / theirs
                assert reached == pytest.approx(goal, abs=1e-6)
            expected += mine
            usual[i, j] = (1 - beta) * goal + beta * cosine
        assert relative_error(np.asarray(weights) @ jacobian, expected) < 1e-5
        np.testing.assert_allclose(state.usual_cosines, usual, atol=1e-6)


@pytest.mark.parametrize("name", IN_RANDOM_ORDER)
def test_sums_and_the_mean_behind_a_clip(name):
    """Of agreeing gradients it is K times their mean, and rescaled to 1 the mean."""
    jacobian = np.array([[3.0, 4.0], [3.0, 4.1], [3.0, 3.9]])
    weights, _ = solve(name, jacobian)
    np.testing.assert_allclose(weights, 1, rtol=1e-5)
    rule = weighting.rescaled(RULES[name](3), 1.0)
    np.testing.assert_allclose(rule.update(measured(jacobian), rule.init())[0], 1 / 3, rtol=1e-5)


def test_gradvac_without_memory_is_pcgrad():
    jacobian = np.random.default_rng(4).normal(size=(5, 4))
    stats = measured(jacobian)
    vaccine, surgery = weighting.gradvac(5, beta=0.0, seed=3), weighting.pcgrad(5, seed=3)
    np.testing.assert_array_equal(
        vaccine.update(stats, vaccine.init())[0], surgery.update(stats, surgery.init())[0]
    )


def test_limits_of_cagrad_and_fairgrad():
    jacobian = np.random.default_rng(6).normal(size=(3, 6))
    stats = measured(jacobian)
    mean = weighting.cagrad(3, c=0.0)
    np.testing.assert_allclose(mean.update(stats, mean.init())[0], 1 / 3, rtol=1e-5)
    fair = weighting.fairgrad(3, alpha=1.0)
    np.testing.assert_array_equal(
        fair.update(stats, fair.init())[0],
        weighting.nash_mtl(3).update(stats, fair.init())[0],
    )


@pytest.mark.parametrize(("name", "expected"), [("nash_mtl", 377), ("fairgrad", 2715)])
def test_nearly_opposed_gradients_and_what_heads_get(name, expected):
    """As documented, at 0.2 degrees from opposite; and the bound, which keeps the direction."""
    angle, make = np.deg2rad(0.2), getattr(weighting, name)
    jacobian = 3 * np.array([[1.0, 0.0], [-np.cos(angle), np.sin(angle)]])
    alone = solve(name, 3 * np.eye(2))[0]
    np.testing.assert_allclose(solve(name, jacobian)[0] / alone, expected, rtol=1e-2)
    rule, norms = make(2, max_amplification=10.0), np.array([300.0, 3.0])
    jacobian[0] *= 100
    weights, alone = solve(name, jacobian)[0], solve(name, np.diag(norms))[0]
    bounded = np.asarray(rule.update(measured(jacobian), rule.init())[0], float)
    np.testing.assert_allclose(np.max(bounded / alone), 10, rtol=1e-5)
    np.testing.assert_allclose(bounded[0] / bounded[1], weights[0] / weights[1], rtol=1e-5)
    easy = measured(np.diag(norms) + 0.1)
    np.testing.assert_array_equal(
        rule.update(easy, rule.init())[0], make(2).update(easy, rule.init())[0]
    )


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_gradients_have_the_chosen_length(scale):
    jacobian = np.random.default_rng(7).normal(size=(3, 6)) * [[5.0], [1.0], [0.2]]
    rule = weighting.aligned_mtl(3, scale=scale)
    weights, _ = rule.update(measured(jacobian), rule.init())
    values = np.linalg.svd(jacobian, compute_uv=False)
    length = {"min": values[2], "median": values[1], "rmse": np.sqrt(np.mean(values**2))}[scale]
    np.testing.assert_allclose(
        np.linalg.norm(np.asarray(weights) @ jacobian), length / np.sqrt(3), rtol=1e-5
    )


@pytest.mark.parametrize("norms", [[1.0, 1.0], [1.0, 100.0]])
def test_aligned_gradients_shrink_with_the_angle(norms):
    """Down to what float32 cosines tell: no direction is dropped at once."""
    for degrees in np.geomspace(5, 0.01, 28):
        angle = np.deg2rad(degrees)
        jacobian = np.array([[1, 0], [np.cos(angle), np.sin(angle)]]) * np.c_[norms]
        weights, _ = solve("aligned_mtl", jacobian)
        expected = np.linalg.svd(jacobian, compute_uv=False)[-1] / np.sqrt(2)
        assert np.linalg.norm(weights @ jacobian) == pytest.approx(expected, rel=1e-2, abs=4e-4)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_eigenvalues_of_a_graded_matrix_keep_their_digits(size):
    """Rows that differ by 1e4 make eigenvalues that differ by 1e8: float32 has seven digits."""
    random = np.random.default_rng(size)
    rows = random.normal(size=(size, 3 * size)) * np.logspace(0, -4, size)[:, None]
    gramian = np.float32(rows @ rows.T)
    values, vectors = map(np.asarray, jax.jit(eigen)(gramian))
    expected = np.linalg.svd(rows, compute_uv=False) ** 2
    np.testing.assert_allclose(np.sort(values)[::-1], expected, rtol=3e-5)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(size), atol=1e-5)
    np.testing.assert_allclose(vectors * values @ vectors.T, gramian, atol=1e-5 * gramian.max())


def test_errors():
    with pytest.raises(ValueError, match=r"c=1.0 must be in \[0, 1\)"):
        weighting.cagrad(2, c=1.0)
    with pytest.raises(ValueError, match="alpha=0 must be positive"):
        weighting.fairgrad(2, alpha=0)
    with pytest.raises(ValueError, match=r"max_amplification=0.5 must be at least 1"):
        weighting.nash_mtl(2, max_amplification=0.5)
    with pytest.raises(ValueError, match=r"beta=1.5 must be in \[0, 1\]"):
        weighting.gradvac(2, beta=1.5)
    with pytest.raises(ValueError, match="scale='max' must be"):
        weighting.aligned_mtl(2, scale="max")
    with pytest.raises(ValueError, match=r"seed=-1 must be a whole number"):
        weighting.pcgrad(2, seed=-1)
    for name, make in RULES.items():
        with pytest.raises(ValueError, match=r"needs stats\.cosines"):
            make(2).update(measured(np.eye(2))._replace(cosines=None), make(2).init())
        with pytest.raises(ValueError, match=r"num_tasks must be an integer"):
            make(2.0)
        assert make(2).needs == {"norms", "cosines"}, name
