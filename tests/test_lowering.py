"""The steps lower for TPU and CUDA and for many devices, where they reduce what they should."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import performance
from gaba_jax import balance, balanced_value_and_grad, task_value_and_grad, weighting
from tests.elements import of_elements
from tests.on_eight_devices import of_process
from tests.slow import rest_slow

K, BATCH, PART, WIDE = 2, 512, 256, 1536  # wide enough beside the batch for norms from factors


RULES = {
    "gaba": weighting.gaba,
    "inverse_norm": weighting.inverse_norm,
    "upgrad": weighting.upgrad,
    "elements": of_elements,
}


def encoder(params, x, y):
    return jnp.tanh(jnp.tanh(x @ params["kernel_0"]) @ params["kernel_1"])


def heads(params, h, x, y):
    return tuple(10.0**i * jnp.mean((h @ params[f"head_{i}"] - y) ** 2) for i in range(K))


def losses_fn(params, x, y):
    return heads(params, encoder(params, x, y), x, y)


OPTIONS = {
    "exact": {},
    "exact, drop": {"nonfinite": "drop"},
    "lagged": {"measure": "lagged"},
    "encoder": {"encoder": encoder},
    "every": {"every": 10},
    "lagged, every": {"measure": "lagged", "every": 10},
    "microbatches": {"microbatch_size": PART},
    "lagged, microbatches": {"measure": "lagged", "microbatch_size": PART},
    "encoder, microbatches": {"encoder": encoder, "microbatch_size": PART},
    "lagged, drop": {"measure": "lagged", "nonfinite": "drop"},
}
EACH_PATH = rest_slow(
    ["stacked", *OPTIONS], fast=["stacked", "exact", "lagged, every", "encoder, microbatches"]
)
FACTORED = {"exact", "exact, drop", "every"}


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def make_step(path, rule):
    """The step and the shapes of its arguments: nothing is computed."""
    adamw = optax.adamw(1e-3)
    names = [f"head_{i}" for i in range(K)]
    params = dict.fromkeys(("kernel_0", "kernel_1"), array(WIDE, WIDE))
    params |= dict.fromkeys(names, array(WIDE))
    if path == "stacked":
        tx = balance(rule)

        def gradient(params, state, x, y):
            losses, grads = task_value_and_grad(losses_fn)(params, x, y)
            grads, state = tx.update(grads, state, params)
            return (losses, grads), state

        init = tx.init
    else:
        whole = heads if "encoder" in OPTIONS[path] else losses_fn
        init, gradient = balanced_value_and_grad(whole, rule, **OPTIONS[path])

    def step(params, state, opt_state, x, y):
        (losses, grads), state = gradient(params, state, x, y)
        updates, opt_state = adamw.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, losses

    state = jax.eval_shape(init, params)
    opt_state = jax.eval_shape(adamw.init, params)
    return step, (params, state, opt_state), (array(BATCH, WIDE), array(BATCH))


def lower(step, carry, batch):
    exported = export.export(jax.jit(step), platforms=["tpu", "cuda"])(*carry, *batch)
    assert exported.platforms == ("tpu", "cuda")
    return exported


def placed(tree, mesh, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.mark.parametrize("rule", rest_slow(RULES, fast=["gaba"]))
@pytest.mark.parametrize("path", EACH_PATH)
def test_exports_for_tpu_and_cuda_without_a_call_out_of_the_program(path, rule):
    module = lower(*make_step(path, RULES[rule](K))).mlir_module()
    assert "custom_call" not in module
    assert "callback" not in module
    # The exact paths are here for their products over the batch; with cosines "lagged" is exact.
    factored = path in FACTORED or (
        "lagged" in path and "microbatches" not in path and rule == "upgrad"
    )
    assert (f"tensor<{BATCH}x{BATCH}xf32>" in module) == factored


AXES = rest_slow([AxisType.Auto, AxisType.Explicit], fast=[AxisType.Auto])


@pytest.mark.parametrize("axes", AXES, ids=["auto", "explicit"])
@pytest.mark.parametrize("path", EACH_PATH)
def test_traces_for_256_devices(path, axes):
    step, carry, batch = make_step(path, weighting.gaba(K))
    mesh = AbstractMesh((256,), ("data",), axis_types=(axes,))
    with jax.sharding.use_abstract_mesh(mesh):
        exported = lower(step, placed(carry, mesh), placed(batch, mesh, "data"))
    assert exported.nr_devices == 256
    assert "custom_call" not in exported.mlir_module()


LAYOUTS = {
    "plain": ("data parallel",),
    "stacked": ("data parallel", "fsdp"),
    "exact": ("data parallel", "fsdp"),
    "exact, cosines": ("data parallel", "fsdp"),
    "lagged": ("data parallel",),
    "encoder": ("data parallel",),
}
COUNT = f"""
import json, jax
jax.config.update("jax_num_cpu_devices", 8)
from benchmarks import _models, lowering
model = _models.build("mlp", {K}, batch_size=16, widths=(8, 16, 16))
found = {{path: lowering.compiled(path, model, {K}, on) for path, on in {LAYOUTS}.items()}}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def on_eight_devices(tmp_path_factory):
    """Collectives and deviations that benchmarks.lowering finds, in a process of 8 devices."""
    return of_process(tmp_path_factory, "lowering", "-c", COUNT)


def test_data_parallel_reduces_each_gradient_that_is_measured_once(on_eight_devices):
    found = {path: layouts["data parallel"] for path, layouts in on_eight_devices.items()}
    trunk, head, losses = 4 * (8 * 16 + 16 * 16 + 2 * 16), 4 * 16, 4 * K  # bytes
    gradient = trunk + K * head
    stacked = K * trunk + K * head + losses  # a head has the gradient of one task
    reduced = {path: tuple(row["all-reduce"].values()) for path, row in found.items()}
    # With the norms of the features' gradients, and again in the loop for those that are in doubt.
    assert reduced.pop("encoder") == (1, gradient + losses)
    assert reduced == {
        "plain": (1, gradient + losses),
        "stacked": (1, stacked),
        "exact": (1, stacked),  # too narrow beside the batch to be anything else
        "exact, cosines": (1, stacked),
        "lagged": (K + 1, K * gradient + losses),  # the losses apart
    }
    assert all(row["bytes"] == row["all-reduce"]["bytes"] for row in found.values())
    loops = {path: row["uncounted_loops"] for path, row in found.items()}
    assert loops.pop("exact, cosines") <= 3  # upgrad has two of its own
    assert max(loops.values()) <= 1


@pytest.mark.parametrize("path", LAYOUTS)
def test_eight_devices_take_the_steps_of_one(on_eight_devices, path):
    for layout in LAYOUTS[path]:
        assert on_eight_devices[path][layout]["deviation"] <= 1e-5


@pytest.mark.parametrize("num_tasks", ["2", "8"])
def test_the_stored_paths_gather_sharded_kernels_as_often_as_a_plain_step(num_tasks):
    paths = performance.read("lowering")["compiled"][num_tasks]["fsdp"]
    assert paths["plain"]["all-gather"]["executions"] > 0
    for path, row in paths.items():
        if not path.startswith("exact"):  # which gathers factors too
            assert row["all-gather"] == paths["plain"]["all-gather"]
        assert not {"all-to-all", "collective-permute", "reduce-scatter"} & set(row)
    for path in ("exact", "exact, cosines"):
        assert paths[path]["bytes"] <= paths["stacked"]["bytes"]
