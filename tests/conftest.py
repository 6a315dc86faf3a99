"""What all tests share: the compilation cache, the golden arrays, a small two-headed model."""

import functools
import gc
import os
import pathlib

# Before NumPy and SciPy load it: where threads wait for a core, QR factors take 100 times as long.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

# Compiling takes most of the time of the tests; XLA's quicker code generation saves half of it.
# With XLA_FLAGS set, be it to "", they run as users do: .ci/run does, with the oldest versions.
QUICKER = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # a flag that XLA does not know ends the process
    QUICKER += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICKER)

# The shapes in the annotations of the dense helpers hold in every test.
DENSE = ["gaba_jax._state", "gaba_jax._statistics", "gaba_jax.monitor", "gaba_jax.turbofan.model"]
jaxtyping.install_import_hook(DENSE, "beartype.beartype")

# A busy machine is no failure. In CI the examples are the same every time, so that a change is
# judged by what it changed; elsewhere they are new ones.
hypothesis.settings.register_profile(
    "here", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("here"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "here")

GOLDEN = pathlib.Path(__file__).parent / "golden"


# Who asks for one of these is slow: real data, eight devices in another process, a browser.
SLOW_FIXTURES = {"cmapss", "on_eight_devices", "chromium"}


@pytest.hookimpl(tryfirst=True)  # before those marks deselect
def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """What was imported stays: looking through it for garbage, again and again, takes a tenth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """One cache of compiled programs for all workers of a run."""
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root
    jax.config.update("jax_compilation_cache_dir", str(shared / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module")
def compiled_once():
    """Training runs of one configuration share their compiled program."""
    from tests.runs import share_programs  # after the import hook above

    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch)
        yield


@pytest.fixture(scope="session")
def golden():
    """``golden(name)`` opens tests/golden/name.npz."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


@pytest.fixture
def toy():
    """(losses_fn, params, batch) of a two-headed model whose gradients differ by some 500x."""

    def losses_fn(params, x, y):
        h = jnp.tanh(x @ params["backbone"]["kernel"] + params["backbone"]["bias"])
        rul = jnp.mean((h @ params["rul_head"] - y) ** 2)
        health = jnp.mean((h @ params["health_head"]) ** 2)
        return {"health": health, "rul": rul}

    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "backbone": {
            "kernel": jax.random.normal(keys[0], (4, 8)) * 0.5,
            "bias": jnp.zeros(8),
        },
        "rul_head": jax.random.normal(keys[1], (8,)),
        "health_head": jax.random.normal(keys[2], (8,)) * 0.1,
    }
    x = jax.random.normal(keys[3], (16, 4))
    return losses_fn, params, (x, 50 + 20 * x[:, 0])


@pytest.fixture(scope="session")
def by_hand():
    """``by_hand(losses_fn, params, *batch)``: weights and update of weighting.inverse_norm, written
    out. Norms are those of ``params["backbone"]``; ``present`` marks tasks; ``first`` is applied to
    the gradients, leaves [K, ...], before they are measured.
    """

    @functools.partial(jax.jit, static_argnames=("losses_fn", "first"))
    def by_hand(losses_fn, params, *batch, present=True, first=lambda grads: grads):
        grads = jax.jacrev(lambda p: jnp.hstack(jax.tree.leaves(losses_fn(p, *batch))))(params)
        grads = first(grads)
        flat = [g.reshape(g.shape[0], -1) for g in jax.tree.leaves(grads["backbone"])]
        norms = jnp.linalg.norm(jnp.concatenate(flat, axis=1), axis=1)
        weights = jnp.where(present, 1 / norms, 0)
        weights /= weights.sum()
        return weights, jax.tree.map(lambda g: jnp.einsum("k,k...->...", weights, g), grads)

    return by_hand
