"""Against runs of independent implementations of the published formulas (see golden/README.md)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gaba_jax import BalanceState, exclude, gaba, task_value_and_grad, weighting
from gaba_jax.weighting import TaskStats
from tests.slow import rest_slow_of_several

CONSTANTS = {"paper": (0.99, 100, 0.05), "fast": (0.9, 3, 0.02)}


@pytest.mark.parametrize("num_tasks", [2, 3, 5, 10])
@pytest.mark.parametrize("constants", CONSTANTS)
def test_norm_sequences(golden, num_tasks, constants):
    arrays = golden("gaba_norm_sequences")
    beta, warmup_steps, min_weight = CONSTANTS[constants]
    rule = weighting.gaba(num_tasks, beta=beta, warmup_steps=warmup_steps, min_weight=min_weight)

    def step(state, norms):
        stats = TaskStats(norms, None, None, jnp.ones(num_tasks, bool), jnp.int32(1))
        weights, state = rule.update(stats, state)
        return state, (weights, state.ema_weights)

    norms = jnp.asarray(arrays[f"k{num_tasks}_norms"], jnp.float32)
    _, (weights, averages) = jax.lax.scan(step, rule.init(), norms)
    np.testing.assert_allclose(weights, arrays[f"k{num_tasks}_{constants}_weights"], atol=2e-5)
    np.testing.assert_allclose(averages, arrays[f"k{num_tasks}_{constants}_ema"], atol=2e-5)


class DualHead(nnx.Module):
    def __init__(self, arrays):
        def linear(name):
            kernel = arrays[f"init/{name}.weight"].T
            layer = nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0))
            layer.kernel[...] = jnp.asarray(kernel)
            layer.bias[...] = jnp.asarray(arrays[f"init/{name}.bias"])
            return layer

        if "init/backbone.weight" in arrays:
            self.backbone = nnx.Sequential(linear("backbone"))
        else:
            self.backbone = nnx.Sequential(linear("backbone.0"), nnx.relu, linear("backbone.2"))
        self.rul_head = linear("rul_head")
        self.health_head = linear("health_head")

    def __call__(self, x):
        h = self.backbone(x)
        return self.rul_head(h)[..., 0], self.health_head(h)


SHARED = {"auto": None, "named": exclude("rul_head", "health_head")}
RUNS = list(itertools.product(["linear", "two_layer"], ["sgd", "adamw"], SHARED))
OFTEN = [("two_layer", "sgd", "auto")]


@pytest.mark.parametrize(
    ("backbone", "optimizer", "shared"), rest_slow_of_several(RUNS, fast=OFTEN)
)
def test_training(golden, backbone, optimizer, shared):
    arrays = golden(f"gaba_training_{backbone}_{optimizer}")
    inner = optax.sgd(1e-3) if optimizer == "sgd" else optax.adamw(1e-3, weight_decay=1e-4)
    tx = optax.chain(
        gaba(warmup_steps=20 if optimizer == "sgd" else 100, shared=SHARED[shared]), inner
    )
    graph, params = nnx.split(DualHead(arrays), nnx.Param)
    x, rul = jnp.asarray(arrays["x"]), jnp.asarray(arrays["rul"])
    health = jnp.asarray(arrays["health"], jnp.int32)

    def losses_fn(params):
        predicted, logits = nnx.merge(graph, params)(x)
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(logits, health)
        return jnp.mean((predicted - rul.reshape(predicted.shape)) ** 2), cross_entropy.mean()

    def step(carry, _):
        params, opt_state = carry
        losses, grads = task_value_and_grad(losses_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        state = opt_state[0]
        assert isinstance(state, BalanceState)
        record = (losses, state.task_norms, state.weighting_state.ema_weights, state.task_weights)
        return (optax.apply_updates(params, updates), opt_state), (record, grads)

    @jax.jit
    def train(params):
        (_, first) = step((params, tx.init(params)), None)[1]
        steps = arrays["losses"].shape[0]

        def only_record(carry, _):
            carry, (record, _) = step(carry, None)
            return carry, record

        (params, _), records = jax.lax.scan(only_record, (params, tx.init(params)), length=steps)
        return params, records, first

    params, (losses, norms, averages, weights), first = train(params)
    layer = {"linear": {"backbone": 0}, "two_layer": {"backbone.0": 0, "backbone.2": 2}}[backbone]
    for name, index in layer.items():
        for task, loss in enumerate(["rul", "health"]):
            grad = first["backbone"]["layers"][index]
            expected = arrays[f"grad0/{loss}/{name}.weight"].T
            scale = np.abs(expected).max()
            np.testing.assert_allclose(grad["kernel"][...][task], expected, atol=1e-5 * scale)
            expected = arrays[f"grad0/{loss}/{name}.bias"]
            np.testing.assert_allclose(grad["bias"][...][task], expected, atol=1e-5 * scale)
    # Under Adam a ReLU unit at the edge flips after some 240 steps in one of the two float32 runs,
    # and they leave step; until then they must agree, and stay near each other afterwards.
    in_step = 240 if (backbone, optimizer) == ("two_layer", "adamw") else len(losses)
    for actual, name in [(norms, "norms"), (weights, "weights"), (averages, "ema")]:
        np.testing.assert_allclose(actual[:in_step], arrays[name][:in_step], rtol=1e-4)
        np.testing.assert_allclose(actual, arrays[name], rtol=2e-2)
    np.testing.assert_allclose(losses[:in_step], arrays["losses"][:in_step], rtol=1e-4)
    if in_step == len(losses):
        final = params["rul_head"]["kernel"][...]
        expected = arrays["final/rul_head.weight"].T
        np.testing.assert_allclose(final, expected, rtol=1e-4, atol=1e-5)
