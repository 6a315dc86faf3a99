"""Tasks with examples of their own: one backward pass has the numbers of stacked gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax
from jax.extend.core import ClosedJaxpr, Jaxpr

from gaba_jax import (
    _gradients,
    _products,
    balance,
    balanced_value_and_grad,
    example_norms,
    exclude,
    only,
    task_value_and_grad,
    weighting,
)
from tests.debugging import MODES
from tests.elements import of_elements
from tests.slow import rest_slow, rest_slow_of_several
from tests.test_conformance import RULES as EVERY_RULE
from tests.test_cut import assert_close, cosine_rule

N, WIDTH = 6, 12
NORMAL = np.random.default_rng(0).normal
SCALES = np.geomspace(1, 300, N).astype(np.float32)
IDS = jnp.array([0, 1, 1, 0, 2, 7])  # the last is of no task, and the fourth task has no slice
RULES = {"norms": weighting.inverse_norm, "cosines": cosine_rule, "none": weighting.uniform}


def normal(*shape, scale=1.0):
    return jnp.asarray(NORMAL(size=shape) * scale, jnp.float32)


def dense(params, x):
    for name in ("first", "second"):
        h = x @ params[name]["kernel"]
        x = jnp.tanh(h + jnp.broadcast_to(params[name]["bias"], h.shape))
    return x @ params["last"]


def of_batch(params, x, y):
    return jnp.mean((dense(params, x)[..., 0] - y) ** 2)


def dense_params(inputs=9, width=2 * WIDTH):
    kernels = {"first": (inputs, width), "second": (width, width)}
    layers = {
        name: {"kernel": normal(*shape, scale=shape[0] ** -0.5), "bias": normal(width, scale=0.1)}
        for name, shape in kernels.items()
    }
    return layers | {"last": normal(width, 1)}


def layer_norm(x, scale):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return scale * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def attention(params, tokens, y):
    """An embedding, LayerNorm, attention with several heads, and a residual."""
    x = params["table"][tokens]
    h = layer_norm(x, params["scale"])
    q, k, v = (jnp.einsum("td,dnh->tnh", h, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("tnh,snh->nts", q, k), axis=-1)
    x = x + jnp.einsum("nts,snh,nhd->td", weights, v, params["out"])
    return jnp.mean((x @ params["last"] - y) ** 2)


def attention_params():
    per_head = {name: normal(WIDTH, 2, WIDTH, scale=0.3) for name in "qkv"}
    return per_head | {
        "table": normal(50, WIDTH),
        "scale": jnp.ones(WIDTH),
        "out": normal(2, WIDTH, WIDTH, scale=0.3),
        "last": normal(WIDTH),
    }


def recurrent(params, x, y):
    def step(h, x):
        h = jnp.tanh(x @ params["in"] + h @ params["hidden"])
        return h, h

    _, states = lax.scan(step, jnp.zeros(WIDTH), x)
    return jnp.mean((states @ params["out"] - y) ** 2)


def convolution(params, x, y):
    numbers = ("NHC", "HIO", "NHC")
    h = lax.conv_general_dilated(
        x[None], params["kernel"], (1,), "VALID", dimension_numbers=numbers
    )
    return jnp.mean((jnp.tanh(h[0]) @ params["last"] - y) ** 2)


def equation(params, x, y):
    """Value, first and second derivative: every kernel is used several times."""

    def u(x):
        return jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"]) @ params["last"]

    def residual(x):
        along = jnp.ones_like(x)
        value, slope = jax.jvp(u, (x,), (along,))
        curve = jax.jvp(lambda x: jax.jvp(u, (x,), (along,))[1], (x,), (along,))[1]
        return value + slope - curve

    return jnp.mean((jax.vmap(residual)(x) - y) ** 2)


MODELS = {
    "mlp": (of_batch, dense_params, lambda n: (normal(n, 4, 9), normal(n, 4))),
    "examples": (of_batch, dense_params, lambda n: (normal(n, 9), normal(n))),
    "attention": (
        attention,
        attention_params,
        lambda n: (jnp.asarray(np.random.default_rng(1).integers(0, 50, (n, 5))), normal(n, 5)),
    ),
    "lstm": (
        recurrent,
        lambda: {"in": normal(3, WIDTH), "hidden": normal(WIDTH, WIDTH), "out": normal(WIDTH)},
        lambda n: (normal(n, 5, 3), normal(n, 5)),
    ),
    "convolution": (
        convolution,
        lambda: {"kernel": normal(3, 4, 6), "last": normal(6)},
        lambda n: (normal(n, 9, 4), normal(n, 7)),
    ),
    "equation": (
        equation,
        lambda: {
            "first": normal(2, 4 * WIDTH),
            "second": normal(4 * WIDTH, 4 * WIDTH, scale=0.2),
            "last": normal(4 * WIDTH),
        },
        lambda n: (normal(n, 3, 2), normal(n, 3)),
    ),
}
# How many leaves of each are kept as factors; what ends in a scan or a convolution is not.
FACTORS = {"mlp": 2, "examples": 2, "attention": 5, "lstm": 0, "convolution": 0, "equation": 1}


def case(name, n=N):
    loss_fn, make_params, make_batch = MODELS[name]
    *x, y = make_batch(n)
    return loss_fn, make_params(), (*x, y * np.resize(SCALES, (n, *[1] * (y.ndim - 1))))


def stacked(loss_fn, rule, params, *args, ids=None, mask=None, in_axes=0, **options):
    """Losses, gradient and state of one update on the gradients of all slices."""
    axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
    losses, grads = jax.vmap(jax.value_and_grad(loss_fn), (None, *axes))(params, *args)
    if ids is not None:
        members = np.arange(rule.num_tasks)[:, None] == np.asarray(ids)
        counts = members.sum(axis=1)
        mask = (counts > 0) & (True if mask is None else mask)

        def mean(leaf):
            leaf = np.asarray(leaf, np.float32)
            each = [leaf[own].mean(axis=0) if own.any() else 0 * leaf[0] for own in members]
            return jnp.asarray(np.stack(each))

        losses, grads = mean(losses), jax.tree.map(mean, grads)
    tx = balance(rule, **options)
    extra = {"task_losses": losses} if "losses" in rule.needs else {}
    grads, state = tx.update(grads, tx.init(params), params, task_mask=mask, **extra)
    return losses, grads, state


def sliced(loss_fn, rule, params, *args, ids=None, mask=None, in_axes=0, **options):
    balanced = balanced_value_and_grad(loss_fn, rule, in_axes=in_axes, **options)

    @jax.jit
    def step(params, state, ids, mask, *args):
        return balanced.value_and_grad(params, state, *args, task_ids=ids, task_mask=mask)

    (losses, grads), state = step(params, balanced.init(params), ids, mask, *args)
    return losses, grads, state


def assert_alike(found, expected):
    """Losses, gradient and state to 1e-5, cosines to rounding of unit gradients."""
    assert_close(found[:2], expected[:2])
    for name in ("task_weights", "next_task_weights", "task_norms"):
        assert_close(getattr(found[2], name), getattr(expected[2], name))
    if found[2].task_cosines is not None:
        np.testing.assert_allclose(
            found[2].task_cosines, expected[2].task_cosines, rtol=0, atol=1e-5
        )


ROWS = [
    (model, rule, some)
    for model in MODELS
    for rule in ("norms", "cosines")
    for some in ("each", "ids", "ids and mask")
]
FEW = [
    ("mlp", "norms", "each"),
    ("mlp", "cosines", "ids and mask"),
]


@pytest.mark.parametrize(("model", "rule", "some"), rest_slow_of_several(ROWS, FEW))
def test_it_is_the_stacked_update(model, rule, some):
    loss_fn, params, batch = case(model)
    num_tasks = N if some == "each" else 4
    mask = jnp.array([True, False, True, True]) if "mask" in some else None
    given = {"ids": None if some == "each" else IDS, "mask": mask}
    expected = stacked(loss_fn, RULES[rule](num_tasks), params, *batch, **given)
    assert_alike(sliced(loss_fn, RULES[rule](num_tasks), params, *batch, **given), expected)


@pytest.mark.parametrize("name", rest_slow(EVERY_RULE, ["gradnorm", "upgrad"]))
def test_every_rule(name):
    loss_fn, params, batch = case("examples", 3)
    found = sliced(loss_fn, EVERY_RULE[name](), params, *batch)
    expected = stacked(loss_fn, EVERY_RULE[name](), params, *batch)
    assert_close(
        found[:2], expected[:2], rtol=1e-4 if "cosines" in EVERY_RULE[name]().needs else 1e-5
    )
    assert_close(found[2].task_norms, expected[2].task_norms)


@pytest.mark.parametrize("model", rest_slow(MODELS, ["mlp"]))
def test_what_is_kept_as_factors(model, monkeypatch):
    loss_fn, params, batch = case(model)
    made = []
    found = _products.form_of
    monkeypatch.setattr(_products, "form_of", lambda *args: made.append(found(*args)) or made[-1])
    jax.eval_shape(lambda *args: example_norms(loss_fn, *args), params, *batch)
    assert sum(form is not None for form in made) == FACTORS[model]


@pytest.mark.parametrize("rule", rest_slow(["norms", "cosines"], ["norms"]))
def test_a_backward_pass_that_is_not_understood(rule, monkeypatch):
    monkeypatch.setattr(_gradients, "understood", lambda *_: None)
    monkeypatch.setattr("gaba_jax._slices.understood", lambda *_: None)
    loss_fn, params, batch = case("examples")
    expected = stacked(loss_fn, RULES[rule](N), params, *batch)
    assert_alike(sliced(loss_fn, RULES[rule](N), params, *batch), expected)


@pytest.mark.parametrize("way", ["rows", "blocks", "each"])
def test_every_way_to_the_products(way, monkeypatch):
    """Whichever is the cheapest; the blocks are of a width that does not divide the leaf."""
    for name in ("rows", "blocks", "each"):
        monkeypatch.setattr(
            _products.Products, f"_cost_of_{name}", lambda self, name=name: int(name != way)
        )
    loss_fn, params, batch = case("mlp")
    rules = [cosine_rule(N)] if way != "each" else [weighting.inverse_norm(4)]
    for rule in rules:
        ids = None if rule.num_tasks == N else IDS
        expected = stacked(loss_fn, rule, params, *batch, ids=ids)
        assert_alike(sliced(loss_fn, rule, params, *batch, ids=ids), expected)


@pytest.mark.parametrize(
    ("rule", "ids"),
    rest_slow_of_several([("norms", None), ("norms", IDS), ("none", IDS)], [("norms", IDS)]),
    ids=str,
)
def test_lagged_is_the_same_with_the_weights_from_before(rule, ids):
    loss_fn, params, batch = case("mlp")
    made = RULES[rule](N if ids is None else 4)
    found = sliced(loss_fn, made, params, *batch, ids=ids, measure="lagged")
    losses, _, state = stacked(loss_fn, made, params, *batch, ids=ids)
    before = stacked(loss_fn, weighting.uniform(made.num_tasks), params, *batch, ids=ids)
    assert_close(found[:2], (losses, before[1]))
    if rule != "none":
        assert_close(found[2].task_norms, state.task_norms)
        assert_close(found[2].next_task_weights, state.next_task_weights)


@pytest.mark.parametrize("measure", ["exact", "lagged"])
@pytest.mark.parametrize("ids", [None, IDS], ids=["each", "ids"])
def test_drop_leaves_out_the_task_of_a_bad_slice(measure, ids):
    """A NaN in one example reaches neither another task's gradient nor its weight."""
    loss_fn, params, (x, y) = case("mlp")
    rule = weighting.inverse_norm(N if ids is None else 4)
    bad = 1  # of task 1 in either case
    found = sliced(
        loss_fn, rule, params, x.at[bad].set(jnp.nan), y, ids=ids, measure=measure, nonfinite="drop"
    )
    state = found[2]
    assert state.nonfinite_count == 1
    chex.assert_tree_all_finite(found[1])
    usable = jnp.arange(rule.num_tasks) != 1
    expected = stacked(
        loss_fn, weighting.uniform(rule.num_tasks), params, x, y, ids=ids, mask=usable
    )
    assert_close(found[1], expected[1])
    np.testing.assert_allclose(state.task_weights, expected[2].task_weights, rtol=1e-6)


@pytest.mark.parametrize("measure", ["exact", "lagged"])
@pytest.mark.parametrize("rule", rest_slow(["norms", "cosines", "none"], ["norms"]))
@pytest.mark.parametrize("model", rest_slow(["mlp", "attention"], ["mlp"]))
def test_absent_tasks_and_padding_are_never_read(rule, measure, model):
    loss_fn, params, (x, y) = case(model)
    ids = jnp.array([0, 1, 2, 0, 4, -1])  # the last two are padding, with K = 3
    made, mask = RULES[rule](3), jnp.array([True, False, True])
    clean = sliced(loss_fn, made, params, x, y, ids=ids, mask=mask, measure=measure)
    bad = jnp.array([1, 4, 5])
    y = y.at[bad].set(jnp.nan)
    x = x.at[bad].set(jnp.nan) if model == "mlp" else x
    found = sliced(loss_fn, made, params, x, y, ids=ids, mask=mask, measure=measure)
    chex.assert_trees_all_close(found[1:], clean[1:], rtol=1e-5, atol=1e-5)
    assert np.isnan(found[0][1])
    chex.assert_tree_all_finite(found[0][jnp.array([0, 2])])


def test_without_slices_of_any_task_nothing_moves():
    loss_fn, params, batch = case("mlp")
    losses, grads, state = sliced(
        loss_fn, weighting.inverse_norm(2), params, *batch, ids=jnp.full(N, 2)
    )
    chex.assert_trees_all_equal((losses, grads), jax.tree.map(jnp.zeros_like, (losses, grads)))
    np.testing.assert_array_equal(state.next_task_weights, [0.5, 0.5])
    assert state.since_measured == 0


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(-3, 6), min_size=N, max_size=N),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_any_ids_and_any_mask(compiled_steps, ids, mask):
    step, (loss_fn, params, batch), rule = compiled_steps
    found = step(params, jnp.array(ids), jnp.array(mask), *batch)
    expected = stacked(loss_fn, rule, params, *batch, ids=ids, mask=np.array(mask))
    assert_alike((found[0][0], found[0][1], found[1]), expected)


@pytest.fixture(scope="module")
def compiled_steps():
    loss_fn, params, batch = case("mlp")
    rule = cosine_rule(4)
    balanced = balanced_value_and_grad(loss_fn, rule, in_axes=0)
    state = balanced.init(params)
    step = jax.jit(
        lambda params, ids, mask, *batch: balanced.value_and_grad(
            params, state, *batch, task_ids=ids, task_mask=mask
        )
    )
    return step, (loss_fn, params, batch), rule


def test_axes_are_those_of_vmap():
    """Along another axis, an argument for all slices, a tree, aux and a keyword for all."""

    def loss_fn(params, batch, offset, key, *, factor):
        kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)  # each slice has its own
        loss = factor * of_batch(params, jnp.where(kept, batch["x"], 0), batch["y"] + offset)
        return loss, {"kept": kept}

    _, params, (x, y) = case("mlp")
    keys = jax.random.split(jax.random.key(0), N)
    batch = {"x": jnp.moveaxis(x, 0, 1), "y": y}
    axes = ({"x": 1, "y": 0}, None, 0)
    balanced = balanced_value_and_grad(loss_fn, cosine_rule(N), in_axes=axes, has_aux=True)
    state = balanced.init(params)
    step = jax.jit(balanced.value_and_grad)
    ((losses, aux), grads), new = step(params, state, batch, 0.5, keys, factor=2.0)

    def of_slice(params, x, y, key):
        return loss_fn(params, {"x": x, "y": y}, 0.5, key, factor=2.0)[0]

    expected = stacked(of_slice, cosine_rule(N), params, x, y, keys)
    assert_alike((losses, grads, new), expected)
    assert aux["kept"].shape == x.shape
    assert len({mask.tobytes() for mask in np.asarray(aux["kept"])}) == N
    stack = task_value_and_grad(loss_fn, has_aux=True, in_axes=axes)
    (losses_, aux_), grads_ = stack(params, batch, 0.5, keys, factor=2.0)
    assert_close((losses_, aux_), (losses, aux))
    assert_close(grads_, jax.vmap(jax.grad(of_slice), (None, 0, 0, 0))(params, x, y, keys))
    lagged = balanced_value_and_grad(
        loss_fn, weighting.inverse_norm(N), in_axes=axes, has_aux=True, measure="lagged"
    )
    result = lagged.value_and_grad(
        params, lagged.init(params), batch, 0.5, keys, factor=2.0, task_ids=jnp.arange(N)[::-1]
    )
    np.testing.assert_array_equal(result[0][0][1]["kept"], aux["kept"])
    assert_close(result[0][0][0][::-1], losses)


@pytest.mark.parametrize("method", ["unroll", "scan"])
def test_stacking_is_literally_vmap_of_value_and_grad(method):
    loss_fn, params, batch = case("mlp")
    expected = jax.vmap(jax.value_and_grad(loss_fn), (None, 0, 0))(params, *batch)
    found = task_value_and_grad(loss_fn, in_axes=0, method=method)(params, *batch)
    assert_close(found, expected, rtol=1e-6)
    tx = optax.chain(balance(weighting.inverse_norm(N)), optax.sgd(1.0))
    updates, _ = tx.update(found[1], tx.init(params), params)
    _, grads, _ = sliced(loss_fn, weighting.inverse_norm(N), params, *batch)
    assert_close(updates, jax.tree.map(jnp.negative, grads))


def test_every_measures_at_the_first_and_holds():
    loss_fn, params, batch = case("mlp")
    balanced = balanced_value_and_grad(loss_fn, weighting.inverse_norm(N), in_axes=0, every=2)
    state, step = balanced.init(params), jax.jit(balanced.value_and_grad)
    _, state = step(params, state, *batch)
    shifted = (batch[0], 2 * batch[1])
    (losses, held), after = step(params, state, *shifted)
    np.testing.assert_array_equal(after.next_task_weights, state.next_task_weights)
    _, grads = jax.vmap(jax.value_and_grad(loss_fn), (None, 0, 0))(params, *shifted)
    weights = state.next_task_weights
    assert_close(held, jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), grads))
    assert [int(each.since_measured) for each in (state, after)] == [1, 2]
    assert losses.shape == (N,)


@pytest.mark.parametrize("ids", [None, IDS], ids=["each", "ids"])
def test_behind_an_encoder_norms_are_those_on_the_features_of_the_task(ids):
    """Norms of the gradient on a task's own features, and the update of the weighted loss."""
    loss_fn, params, (x, y) = case("mlp")
    rule = weighting.inverse_norm(N if ids is None else 4)

    def encoder(params, x, y):
        return jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])

    def heads(params, h, x, y):
        h = jnp.tanh(h @ params["second"]["kernel"] + params["second"]["bias"])
        return jnp.mean(((h @ params["last"])[..., 0] - y) ** 2)

    losses, grads, state = sliced(heads, rule, params, x, y, ids=ids, encoder=encoder)
    of_slices = jax.vmap(jax.grad(heads, argnums=1), (None, 0, 0, 0))(
        params, jax.vmap(encoder, (None, 0, 0))(params, x, y), x, y
    )
    members = jnp.eye(N) if ids is None else (jnp.arange(4)[:, None] == ids).astype(jnp.float32)
    shares = members / jnp.maximum(members.sum(axis=1), 1)[:, None]
    squares = jnp.sum(of_slices**2, axis=(1, 2))
    np.testing.assert_allclose(state.task_norms, jnp.sqrt(shares**2 @ squares), rtol=1e-5)

    def weighted(params):
        each = jax.vmap(loss_fn, (None, 0, 0))(params, x, y)
        return state.task_weights @ (shares @ each)

    assert_close(grads, jax.grad(weighted)(params))
    assert losses.shape == (rule.num_tasks,)


def test_a_leaf_with_all_heads_has_its_rows_moved_by_their_own_task():
    """[tasks, ...] indexed by the task counts as shared; exclude("heads") measures without it."""

    def loss_fn(params, task, x, y):
        return jnp.mean((jnp.tanh(x @ params["trunk"]) @ params["heads"][task] - y) ** 2)

    params = {"trunk": normal(9, 20), "heads": normal(4, 20)}
    _, _, (x, y) = case("mlp")
    rule, tasks = weighting.inverse_norm(4), jnp.clip(IDS, 0, 3)
    found = sliced(loss_fn, rule, params, tasks, x, y, ids=IDS)
    without = sliced(loss_fn, rule, params, tasks, x, y, ids=IDS, shared=exclude("heads"))
    trunk = sliced(loss_fn, rule, params, tasks, x, y, ids=IDS, measure_on=only("trunk"))
    assert_close(without[2].task_norms, trunk[2].task_norms)
    assert bool(jnp.all(found[2].task_norms[:3] > 1.001 * without[2].task_norms[:3]))
    rows = task_value_and_grad(loss_fn, in_axes=0)(params, tasks, x, y)[1]["heads"]
    touched = np.asarray(jnp.any(rows != 0, axis=2))
    np.testing.assert_array_equal(touched, np.asarray(tasks)[:, None] == np.arange(4))
    expected = stacked(loss_fn, rule, params, tasks, x, y, ids=IDS)
    assert_alike(found, expected)


@pytest.mark.parametrize("ids", rest_slow([None, IDS], []), ids=str)
def test_statistics_of_single_elements(ids):
    loss_fn, params, batch = case("mlp")
    rule = of_elements(N if ids is None else 4)
    found = sliced(loss_fn, rule, params, *batch, ids=ids)
    assert_alike(found, stacked(loss_fn, rule, params, *batch, ids=ids))


@pytest.mark.parametrize("dtype", rest_slow([jnp.bfloat16, jnp.float16, jnp.float64], []))
def test_dtypes_are_kept(dtype):
    loss_fn, params, batch = case("mlp")
    with jax.enable_x64(dtype == jnp.float64):
        params, batch = jax.tree.map(lambda p: p.astype(dtype), (params, batch))
        found = sliced(loss_fn, cosine_rule(N), params, *batch)
        expected = stacked(loss_fn, cosine_rule(N), params, *batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(found[1:], expected[1:])
        rounding = 20 * float(jnp.finfo(dtype).eps) if dtype != jnp.float64 else 1e-6
        assert_close(found[1], expected[1], rtol=rounding)
        assert_close(found[2].task_norms, expected[2].task_norms, rtol=rounding)


@pytest.mark.parametrize("scale", rest_slow([1e-18, 1e-12, 1e12, 1e18], [1e-18]))
def test_gradients_of_any_size(scale):
    """Where their squares leave float32, and beside tasks of ordinary size."""

    def loss_fn(params, size, x):
        return size * jnp.mean(jnp.tanh(x @ params["kernel"]) @ params["last"])

    params = {"kernel": normal(30, 30, scale=0.2), "last": normal(30)}
    sizes = jnp.array([1.0, scale, scale, 3.0, 10.0, 1.0], jnp.float32)
    x = normal(N, 4, 30)
    norms, cosines = example_norms(loss_fn, params, sizes, x, cosines=True)
    rows = jax.vmap(jax.grad(loss_fn), (None, None, 0))(params, 1.0, x)
    rows = np.concatenate([np.reshape(leaf, (N, -1)) for leaf in jax.tree.leaves(rows)], axis=1)
    of_unit = np.linalg.norm(np.asarray(rows, np.float64), axis=1)
    np.testing.assert_allclose(norms, of_unit * np.asarray(sizes, np.float64), rtol=1e-5)
    expected = rows @ rows.T / np.outer(of_unit, of_unit)
    np.testing.assert_allclose(cosines, expected, atol=2e-5)


@pytest.mark.parametrize("rule", rest_slow(["norms", "cosines"], ["cosines"]))
def test_a_leaf_without_elements(rule):
    loss_fn, params, batch = case("examples")
    params["empty"] = jnp.zeros((0, 3))
    found = sliced(loss_fn, RULES[rule](N), params, *batch)
    assert_alike(found, stacked(loss_fn, RULES[rule](N), params, *batch))
    assert found[1]["empty"].shape == (0, 3)


@pytest.mark.slow
def test_rows_that_cancel():
    """The gradient of a task is far smaller than those of its rows: digits are not lost."""

    def loss_fn(params, x, signs):
        return jnp.mean(signs * (x @ params["kernel"]).sum(axis=-1))

    params = {"kernel": normal(40, 40)}
    x = jnp.repeat(normal(N, 4, 40), 2, axis=1)
    x = x.at[:, ::2].multiply(1 + 1e-3 * normal(N, 4, 1))
    signs = jnp.tile(jnp.array([1.0, -1.0]), (N, 4))
    norms, cosines = example_norms(loss_fn, params, x, signs, cosines=True)
    exact = jax.vmap(jax.grad(loss_fn), (None, 0, 0))(params, x, signs)["kernel"]
    rows = np.asarray(exact, np.float64).reshape(N, -1)
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-5)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines, unit @ unit.T, atol=2e-5)


def test_the_memory_is_not_that_of_all_gradients():
    """Not [N, parameters], with norms and with cosines; one task's activations when lagged."""
    params, n = dense_params(64, 256), 32
    batch = normal(n, 8, 64), normal(n, 8)
    of_all = n * sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def temp(rule, **options):
        balanced = balanced_value_and_grad(of_batch, rule, in_axes=0, **options)
        step = jax.jit(balanced.value_and_grad).lower(params, balanced.init(params), *batch)
        return step.compile().memory_analysis().temp_size_in_bytes

    plain = jax.jit(jax.grad(lambda p, *b: jnp.mean(jax.vmap(of_batch, (None, 0, 0))(p, *b))))
    plain = plain.lower(params, *batch).compile().memory_analysis().temp_size_in_bytes
    assert temp(weighting.inverse_norm(n)) < min(2 * plain, 0.3 * of_all)
    assert temp(cosine_rule(n)) < min(4 * plain, 0.6 * of_all)
    assert temp(weighting.inverse_norm(n), measure="lagged") < 0.1 * of_all


def products(jaxpr, size):
    """The number of products whose result has at least that size, in and below a program."""
    number = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            number += eqn.outvars[0].aval.size >= size
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, ClosedJaxpr | Jaxpr):
                    number += products(getattr(part, "jaxpr", part), size)
    return number


def test_one_product_a_kernel_and_no_second_backward_pass():
    loss_fn, params, batch = case("examples")
    balanced = balanced_value_and_grad(loss_fn, weighting.inverse_norm(N), in_axes=0)
    state = balanced.init(params)
    step = jax.make_jaxpr(balanced.value_and_grad)(params, state, *batch).jaxpr
    of_kernel = params["second"]["kernel"].size
    plain = jax.make_jaxpr(
        jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0, 0))(p, *batch)))
    )(params).jaxpr
    outside = [eqn for eqn in step.eqns if eqn.primitive.name == "dot_general"]
    assert sum(eqn.outvars[0].aval.size >= of_kernel for eqn in outside) == products(
        plain, of_kernel
    )


@pytest.mark.slow
def test_weights_are_constants_to_a_derivative():
    """The derivative of an updated loss goes through the gradients, by the weights as they are."""
    loss_fn, params, batch = case("examples")
    rule = weighting.inverse_norm(N)
    balanced = balanced_value_and_grad(loss_fn, rule, in_axes=0)
    state = balanced.init(params)
    weights = sliced(loss_fn, rule, params, *batch)[2].task_weights

    def after(params, gradient):
        grads = gradient(params)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return jnp.sum(jax.vmap(loss_fn, (None, 0, 0))(moved, *batch))

    def fixed(params):
        return jax.grad(lambda p: weights @ jax.vmap(loss_fn, (None, 0, 0))(p, *batch))(params)

    found = jax.grad(after)(params, lambda p: balanced.value_and_grad(p, state, *batch)[0][1])
    assert_close(found, jax.grad(after)(params, fixed))


@jax.custom_vjp
def clipped(x):
    """Its gradient is clipped: a backward pass that is not linear."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.01, 0.01),))


@pytest.mark.parametrize("rule", rest_slow(["norms", "none"], ["none"]))
def test_what_is_clipped_within_the_model_is_clipped_slice_by_slice(rule):
    def loss_fn(params, x, y):
        return of_batch(params, clipped(x @ params["in"]), y)

    _, params, batch = case("mlp")
    params["in"] = normal(9, 9)
    expected = stacked(loss_fn, RULES[rule](N), params, *batch)
    assert_alike(sliced(loss_fn, RULES[rule](N), params, *batch), expected)


@pytest.mark.parametrize("model", rest_slow(MODELS, ["examples"]))
def test_example_norms(model):
    loss_fn, params, batch = case(model)
    norms, cosines = jax.jit(lambda *args: example_norms(loss_fn, *args, cosines=True))(
        params, *batch
    )
    leaves = jax.tree.leaves(jax.vmap(jax.grad(loss_fn), (None, 0, 0))(params, *batch))
    rows = np.concatenate([np.reshape(leaf, (N, -1)) for leaf in leaves], axis=1)
    expected = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
    np.testing.assert_allclose(cosines, rows @ rows.T / np.outer(expected, expected), atol=1e-5)
    chex.assert_trees_all_close(example_norms(loss_fn, params, *batch), norms, rtol=1e-5)


@pytest.mark.slow
def test_squares_of_residual_norms_are_the_trace_of_the_tangent_kernel():
    _, params, (x, _) = case("examples")
    jacobian = jax.jacrev(lambda p: dense(p, x)[:, 0])(params)
    rows = np.concatenate([np.reshape(j, (N, -1)) for j in jax.tree.leaves(jacobian)], axis=1)
    norms = example_norms(lambda p, x: dense(p, x)[0], params, x)
    np.testing.assert_allclose(jnp.sum(norms**2), np.trace(rows @ rows.T), rtol=1e-5)


def value_and_grad(in_axes, *args, rule=None, loss_fn=of_batch, ids=None, **options):
    params = dense_params()
    made = balanced_value_and_grad(
        loss_fn, rule or weighting.inverse_norm(N), in_axes=in_axes, **options
    )
    return made.value_and_grad(params, made.init(params), *args, task_ids=ids)


X, Y = normal(N, 4, 9), normal(N, 4)


def in_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    run = jax.shard_map(
        lambda x, y: value_and_grad(0, x, y)[0][1], mesh=mesh, in_specs=spec, out_specs=spec
    )
    return run(X, Y)


MISTAKES = {
    "slices sharded over the devices": in_shard_map,
    "num_tasks=4": lambda: value_and_grad(0, X, Y, rule=weighting.inverse_norm(4)),
    "2 entries": lambda: value_and_grad((0, 0), X),
    "maps no array": lambda: value_and_grad((None, None), X, Y),
    r"integers of shape \(6,\)": lambda: value_and_grad(0, X, Y, ids=jnp.zeros(N)),
    r"got int32 of shape \(5,\)": lambda: value_and_grad(0, X, Y, ids=jnp.zeros(5, int)),
    "nothing is sliced": lambda: value_and_grad(None, X, Y, ids=IDS),
    "ONE scalar loss.*shape \\(4,\\)": lambda: value_and_grad(
        0, X, Y, loss_fn=lambda p, x, y: (dense(p, x)[:, 0] - y) ** 2
    ),
    "ONE scalar loss.*a tuple": lambda: value_and_grad(
        0, X, Y, loss_fn=lambda p, x, y: (of_batch(p, x, y), 0.0)
    ),
    "microbatch_size splits": lambda: value_and_grad(0, X, Y, microbatch_size=2),
    "upgrad needs cosines": lambda: value_and_grad(
        0, X, Y, rule=weighting.upgrad(N), encoder=lambda p, x, y: x
    ),
}


@pytest.mark.parametrize("message", rest_slow(MISTAKES, list(MISTAKES)[1:]))
def test_mistakes_are_told(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()


@pytest.mark.parametrize("measure", ["exact", "lagged"])
def test_scales_that_a_gradient_overwrites_are_refused(measure):
    params = {"kernel": normal(9, 1), "_overwrite_with_gradient": {"scale": jnp.ones(1)}}
    made = balanced_value_and_grad(
        lambda p, x, y: jnp.mean((x @ p["kernel"])[:, 0] - y),
        weighting.inverse_norm(N),
        in_axes=0,
        measure=measure,
    )
    with pytest.raises(ValueError, match="in_axes cannot serve"):
        made.value_and_grad(params, made.init(params), X, Y)


@pytest.mark.parametrize("mode", rest_slow(MODES, ["strict_promotion"]))
@pytest.mark.parametrize("measure", ["exact", "lagged"])
def test_modes_of_jax(mode, measure):
    """Nothing leans on an implicit promotion, makes a NaN, or leaks a tracer."""
    loss_fn, params, batch = case("mlp")
    rule = (cosine_rule if measure == "exact" else weighting.inverse_norm)(4)
    expected = sliced(loss_fn, rule, params, *batch, ids=IDS, measure=measure)
    with MODES[mode]():
        found = sliced(loss_fn, rule, params, *batch, ids=IDS, measure=measure)
    assert_alike(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["exact", "lagged"])
def test_it_lowers_for_accelerators(measure):
    loss_fn, params, batch = case("attention")
    rule = (cosine_rule if measure == "exact" else weighting.inverse_norm)(4)
    balanced = balanced_value_and_grad(loss_fn, rule, in_axes=0, measure=measure)
    state = balanced.init(params)

    def step(params, state, ids, *batch):
        return balanced.value_and_grad(params, state, *batch, task_ids=ids)

    for platform in ("tpu", "cuda"):
        exported = export.export(jax.jit(step), platforms=[platform])(params, state, IDS, *batch)
        assert "callback" not in exported.mlir_module()
