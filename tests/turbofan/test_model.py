"""The published network: its size, its layers against plain ones, its balanced gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from flax import nnx
from jax import lax

from gaba_jax import balance, task_value_and_grad, weighting
from gaba_jax.turbofan._loop import make_driver, make_losses_fn, split_model
from gaba_jax.turbofan._lstm import BidirectionalLSTM
from gaba_jax.turbofan.config import TrainConfig
from gaba_jax.turbofan.data import Split, health_from_rul
from gaba_jax.turbofan.model import CompactModel, Frontend, FullModel, LastStepAttention
from tests.slow import rest_slow

pytestmark = pytest.mark.usefixtures("compiled_quickly")
BATCH, WINDOW, CHANNELS = 8, 12, 17
RULE = weighting.gaba(2, warmup_steps=0, beta=0.5)


def size(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def normal(seed, *shape):
    """Drawn by numpy, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def shaken(module):
    """The module with its parameters and statistics away from where they start."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, state))
    rng = np.random.default_rng(5)
    moved = [leaf + 0.3 * np.abs(rng.standard_normal(leaf.shape)) for leaf in leaves]
    moved = [jnp.asarray(leaf, jnp.float32) for leaf in moved]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved))


def assert_same_function(module, expected, x, rtol=1e-5):
    """``module(x)`` and ``expected(module, x)``: values, gradients of all parameters and of x."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_grads(call, params, x):
        def scalar(params, x):
            out = call(nnx.merge(graph, params, rest, copy=True), x)
            return (out * normal(9, *out.shape)).sum(), out

        (_, out), grads = jax.value_and_grad(scalar, (0, 1), has_aux=True)(params, x)
        return out, grads

    ours = value_and_grads(lambda module, x: module(x), params, x)
    plain = value_and_grads(expected, params, x)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for (path, one), other in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(plain), strict=True
    ):
        assert one.dtype == x.dtype
        np.testing.assert_allclose(
            one, other, rtol=rtol, atol=rtol * largest, err_msg=jax.tree_util.keystr(path)
        )


# Size.


@pytest.fixture(scope="module", autouse=True)
def _one_blas_thread():
    """The orthogonal starts take QR factors, 100 times as slow where threads wait for a core."""
    jnp.linalg.qr(jnp.eye(2))  # loads the library
    with threadpoolctl.threadpool_limits(1, "blas"):
        yield


@pytest.fixture(scope="module")
def model():
    return FullModel(WINDOW, CHANNELS, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_parameters(model):
    """PyTorch counts a second bias of four gates, in two layers and both directions."""
    assert size(model) == 3_493_380
    layers = [model.backbone.lstm_0, model.backbone.lstm_1]
    biases = [way.inputs.bias.size for layer in layers for way in (layer.forward, layer.backward)]
    assert sum(biases) == 4_096
    assert size(model) + sum(biases) == 3_497_476
    assert size(model.backbone.frontend) == 53_184
    assert (size(model.rul_head) + size(model.health_head)) / size(model) < 0.002
    assert size(CompactModel(30, 17, rngs=nnx.Rngs(0))) == 39_172


@pytest.mark.slow
def test_layers_of_the_heads(model):
    def kernels(head):
        return [layer.kernel.shape for layer in head.layers]

    assert kernels(model.rul_head) == [(32, 64), (64, 32), (32, 16), (16, 1)]
    assert kernels(model.health_head) == [(32, 32), (32, 16), (16, 3)]
    assert kernels(model.backbone.dense) == [(512, 256), (256, 64), (64, 32)]
    # At first the cell remembers, and the RUL head lives.
    assert model.rul_head.layers[-1].bias[...] == 1
    gates = model.backbone.lstm_0.forward.inputs.bias[...].reshape(4, 256)
    np.testing.assert_array_equal(gates, np.repeat([[0.0], [1.0], [0.0], [0.0]], 256, axis=1))


@pytest.mark.parametrize(("window", "channels", "batch"), [(30, 14, 3), (30, 17, 1), (50, 20, 4)])
def test_shapes(window, channels, batch):
    def run(x, key):
        return FullModel(window, channels, rngs=nnx.Rngs(0))(x, key=key)

    x = jax.ShapeDtypeStruct((batch, window, channels), jnp.float32)
    for key in (None, jax.random.key(0)):
        rul, logits = jax.eval_shape(functools.partial(run, key=key), x)
        assert (rul.shape, logits.shape) == ((batch,), (batch, 3))


# Layers.


def plain_lstm(layer, x):
    """The formula, a step at a time, and JAX's own gradient of it."""

    def one_way(way, x):
        w, u, b = way.inputs.kernel[...], way.recurrent[...], way.inputs.bias[...]

        def step(carry, at):
            h, c = carry
            i, f, g, o = jnp.split(at @ w + h @ u + b, 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[1], len(u)), x.dtype)
        return lax.scan(step, (zeros, zeros), x)[1]

    backward = one_way(layer.backward, x[::-1])[::-1]
    return jnp.concatenate([one_way(layer.forward, x), backward], axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("wide", rest_slow([False, True], fast=[True]))
def test_lstm_is_the_plain_recurrence(wide):
    """Values, and the gradients that are written out: of x, W, U and b, both directions."""
    with jax.enable_x64(wide):
        layer = shaken(BidirectionalLSTM(3, 4, rngs=nnx.Rngs(0)))
        dtype = jnp.float64 if wide else jnp.float32
        nnx.update(layer, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(layer)))
        x = normal(0, 5, 2, 3).astype(dtype)
        assert_same_function(layer, plain_lstm, x, rtol=1e-12 if wide else 1e-5)


@pytest.mark.slow
def test_lstm_is_that_of_pytorch():
    """With copied weights: the gates in the order i, f, g, o, and the sum of its two biases."""
    torch = pytest.importorskip("torch")
    layer = shaken(BidirectionalLSTM(3, 4, rngs=nnx.Rngs(0)))
    theirs = torch.nn.LSTM(3, 4, bidirectional=True)
    ways = {"": layer.forward, "_reverse": layer.backward}
    with torch.no_grad():
        for suffix, way in ways.items():
            pairs = {
                "weight_ih": way.inputs.kernel[...].T,
                "weight_hh": way.recurrent[...].T,
                "bias_ih": 0.25 * way.inputs.bias[...],
                "bias_hh": 0.75 * way.inputs.bias[...],
            }
            for name, value in pairs.items():
                getattr(theirs, f"{name}_l0{suffix}").copy_(torch.tensor(np.asarray(value)))
    x, cotangent = normal(0, 5, 2, 3), normal(1, 5, 2, 8)
    x_theirs = torch.tensor(np.asarray(x), requires_grad=True)
    expected = theirs(x_theirs)[0]
    expected.backward(torch.tensor(np.asarray(cotangent)))

    graph, params = nnx.split(layer, nnx.Param)
    out, pull_back = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
    grads, grad_x = pull_back(cotangent)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(out, expected.detach())
    close(grad_x, x_theirs.grad)
    for suffix, name in (("", "forward"), ("_reverse", "backward")):
        of = grads[name]
        close(of["inputs"]["kernel"][...].T, getattr(theirs, f"weight_ih_l0{suffix}").grad)
        close(of["recurrent"][...].T, getattr(theirs, f"weight_hh_l0{suffix}").grad)
        for bias in ("bias_ih", "bias_hh"):
            close(of["inputs"]["bias"][...], getattr(theirs, f"{bias}_l0{suffix}").grad)


def plain_frontend(frontend, x, *, of_batch, moments=None):
    """XLA's convolution and BatchNorm's formula; appends the moments of each batch."""
    for layer, norm in zip(frontend.convolutions, frontend.norms, strict=True):
        kernel = layer.kernel[...].reshape(3, x.shape[-1], -1)
        x = lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("WNC", "WIO", "WNC")
        )
        x = x + layer.bias[...]
        mean, var = norm.mean[...], norm.var[...]
        if of_batch:
            mean, var = x.mean(axis=(0, 1)), x.var(axis=(0, 1))
        if moments is not None:
            moments.append((mean, var))
        x = (x - mean) / jnp.sqrt(var + 1e-5) * norm.scale[...] + norm.bias[...]
        x = jnp.maximum(x, 0)
    return x


class InMode(nnx.Module):
    """A frontend with its key, so that it is called with x alone."""

    def __init__(self, frontend, key):
        self.frontend = frontend
        self.key = nnx.data(key)

    def __call__(self, x):
        return self.frontend(x, key=self.key)


@pytest.mark.parametrize("training", [False, True])
def test_frontend_is_a_convolution(training):
    frontend = shaken(Frontend(4, 0.0, rngs=nnx.Rngs(0)))
    module = InMode(frontend, jax.random.key(0) if training else None)
    assert_same_function(
        module,
        lambda module, x: plain_frontend(module.frontend, x, of_batch=training),
        normal(0, 6, 3, 4),
    )


@pytest.mark.slow
def test_training_moves_the_running_statistics_by_a_tenth_and_evaluation_does_not():
    frontend = shaken(Frontend(4, 0.0, rngs=nnx.Rngs(0)))
    x, moments = normal(0, 6, 3, 4), []
    plain_frontend(frontend, x, of_batch=True, moments=moments)
    before = [(norm.mean[...], norm.var[...]) for norm in frontend.norms]
    frontend(x, key=None)
    for norm, (mean, var) in zip(frontend.norms, before, strict=True):
        np.testing.assert_array_equal(norm.mean[...], mean)
        np.testing.assert_array_equal(norm.var[...], var)
    frontend(x, key=jax.random.key(0))
    for norm, old, new in zip(frontend.norms, before, moments, strict=True):
        for after, was, of_batch in zip((norm.mean[...], norm.var[...]), old, new, strict=True):
            np.testing.assert_allclose(after, 0.9 * was + 0.1 * of_batch, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dropout_is_drawn_from_the_key():
    frontend = Frontend(4, 0.25, rngs=nnx.Rngs(0))
    graph, state = nnx.split(frontend)

    @jax.jit
    def run(key, x):
        return nnx.merge(graph, state, copy=True)(x, key=key)

    x = normal(0, 30, 20, 4)
    first, again, other = (run(jax.random.key(seed), x) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    # What is kept of a positive feature is enlarged; about half are negative before the ReLU.
    undropped = Frontend(4, 0.0, rngs=nnx.Rngs(0))(x, key=jax.random.key(0))
    alive = float((first > 0).mean() / (undropped > 0).mean())
    assert 0.7 < alive < 0.8


def full_attention(module, x):
    """Attention between all steps, of which the last is taken at the end."""

    def heads(layer):
        return jnp.swapaxes(layer(x), 0, 1).reshape(x.shape[1], x.shape[0], module.num_heads, -1)

    query, key, value = heads(module.query), heads(module.key), heads(module.value)
    attended = jax.nn.dot_product_attention(query, key, value)
    attended = jnp.swapaxes(attended.reshape(x.shape[1], x.shape[0], -1), 0, 1)
    return module.norm(x + module.out(attended))[-1]


def test_attention_is_full_attention_at_the_last_step():
    attention = shaken(LastStepAttention(12, 3, rngs=nnx.Rngs(0)))
    assert_same_function(attention, full_attention, normal(0, 7, 2, 12))


# The whole.


@pytest.fixture(scope="module")
def evaluate(model):
    graph, _, _ = split_model(model)

    @jax.jit
    def evaluate(params, stats, x):
        merged = nnx.merge(graph, params, stats, copy=True)
        return *merged(x), nnx.state(merged, nnx.BatchStat)

    return evaluate


@pytest.mark.slow
def test_the_predicted_rul_is_never_negative_and_not_dead(evaluate):
    x = 5 * normal(3, BATCH, WINDOW, CHANNELS)
    for seed in range(4):
        _, params, stats = split_model(FullModel(WINDOW, CHANNELS, rngs=nnx.Rngs(seed)))
        rul, logits, _ = evaluate(params, stats, x)
        assert (rul >= 0).all()
        assert (rul > 0).any()
        last = params["rul_head"]["layers"][3]["bias"]
        last[...] = last[...] - 1e3
        below, logits_below, _ = evaluate(params, stats, x)
        np.testing.assert_array_equal(below, 0)
        np.testing.assert_array_equal(logits_below, logits)


def test_evaluation_is_the_same_each_time_and_leaves_the_statistics(model, evaluate):
    _, params, stats = split_model(model)
    x = normal(3, BATCH, WINDOW, CHANNELS)
    first, second = evaluate(params, stats, x), evaluate(params, stats, x)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, first[2], stats)
    alone = evaluate(params, stats, jnp.repeat(x[:1], BATCH, axis=0))
    np.testing.assert_allclose(alone[0][0], first[0][0], rtol=1e-4)  # whatever else is in a batch


@pytest.fixture(scope="module")
def batch():
    rul = jnp.linspace(0.0, 125.0, BATCH)
    return Split(
        windows=normal(4, BATCH, WINDOW, CHANNELS),
        rul=rul,
        health=jnp.asarray(health_from_rul(rul)),
        engine=jnp.arange(BATCH),
        rul_uncapped=rul,
    )


@pytest.fixture(scope="module")
def stacked(model, batch):
    """What a driver is called with, what it should return, and the two gradients beside it."""
    graph, params, stats = split_model(model)
    arguments = stats, batch, jax.random.key(7)
    losses_fn = make_losses_fn(graph, TrainConfig(model="full"))
    value_and_grads = task_value_and_grad(losses_fn, has_aux=True)
    balancer = balance(RULE)

    @jax.jit
    def update(params, state, *arguments):
        (losses, stats), of_tasks = value_and_grads(params, *arguments)
        grads, state = balancer.update(of_tasks, state, params, task_losses=losses)
        return (((losses, stats), grads), state), of_tasks

    found, of_tasks = update(params, balancer.init(params), *arguments)
    return (params, *arguments), found, of_tasks


def updates(model, measure, arguments, count):
    """What ``count`` calls of a run's driver return, all with the same parameters and batch."""
    params, *rest = arguments
    config = TrainConfig(model="full", measure=measure)
    init, value_and_grad = make_driver(split_model(model)[0], config, RULE)
    value_and_grad, state, found = jax.jit(value_and_grad), init(params), []
    for _ in range(count):
        out, state = value_and_grad(params, state, *rest)
        found.append((out, state))
    return found


def assert_same_gradient(grads, expected):
    """Each leaf to 1e-4, but for those that are 0 in exact arithmetic, as before BatchNorm."""
    grads, expected = jax.tree.map(np.asarray, (grads, expected))
    rounding = 1e-7 * np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(expected)))
    for (path, one), other in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        error = np.linalg.norm(one - other)
        assert error <= 1e-4 * np.linalg.norm(other) + rounding, path


def weighted_sum(of_tasks, weights):
    return jax.tree.map(lambda leaf: np.tensordot(weights, leaf, 1), of_tasks)


def assert_same_aux(found, expected):
    """The losses, and the new statistics."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found, expected)


@pytest.mark.slow
def test_exact_weights_and_gradient_are_those_of_the_stacked(model, stacked):
    arguments, ((aux, grads), state), of_tasks = stacked
    [((found, exact_grads), exact)] = updates(model, "exact", arguments, 1)
    np.testing.assert_allclose(exact.task_norms, state.task_norms, rtol=1e-4)
    np.testing.assert_allclose(exact.task_weights, state.task_weights, rtol=1e-4)
    assert_same_gradient(exact_grads, grads)
    assert_same_gradient(grads, weighted_sum(of_tasks, state.task_weights))
    assert_same_aux(found, aux)  # statistics that were moved once, and all of them
    moved = jax.tree.map(lambda a, b: np.any(np.not_equal(a, b)), found[1], arguments[1])
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_lagged_takes_the_weights_of_the_update_before(model, stacked):
    arguments, ((aux, _), state), of_tasks = stacked
    assert abs(float(state.task_weights[0]) - 0.5) > 0.1
    weights = jnp.array([0.5, 0.5]), state.task_weights
    for now, ((found, grads), lagged) in zip(
        weights, updates(model, "lagged", arguments, 2), strict=True
    ):
        np.testing.assert_allclose(lagged.task_weights, now, rtol=1e-4)
        np.testing.assert_allclose(lagged.task_norms, state.task_norms, rtol=1e-4)
        assert_same_gradient(grads, weighted_sum(of_tasks, lagged.task_weights))
        assert_same_aux(found, aux)


@pytest.mark.slow
def test_encoder_sums_with_its_own_weights(model, stacked):
    arguments, ((aux, _), state), of_tasks = stacked
    [((found, grads), proxy)] = updates(model, "encoder", arguments, 1)
    assert abs(float(proxy.task_norms[0] / state.task_norms[0]) - 1) > 0.01  # on the features
    assert_same_gradient(grads, weighted_sum(of_tasks, proxy.task_weights))
    assert_same_aux(found, aux)
