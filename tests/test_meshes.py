"""Placed in every way, a step is that of one device and moves no more than it should."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gaba_jax import balanced_value_and_grad, weighting
from tests.on_eight_devices import (
    BATCH,
    LAYOUTS,
    OPTIMIZERS,
    PAGE,
    PATHS,
    SLICED,
    SLICES,
    WIDE,
    WIDTH,
    K,
    init,
    make_losses,
    make_step,
    of_process,
)

TRUNK, HEAD = 4 * 2 * WIDTH * WIDTH, 4 * WIDTH  # bytes; the heads are one vector each
SMALL = 256  # bytes that norms and a whole vector may add
ROWS = [(name, path) for name in [*LAYOUTS, "shard_map"] for path in PATHS]
ROWS += [(name, path) for name in SLICED for path in SLICES]
ROWS += [("shard_map, unchecked", "plain"), ("shard_map, unchecked", "stacked")]
EXACT = ("exact", "exact, cosines")
# Where parameters are gathered before they are used, and on every other path that measures.
GATHERED = [
    (layout, path)
    for layout in [*LAYOUTS, "shard_map", PAGE]
    for path in PATHS
    if path in ("stacked", "lagged") or (path in EXACT and ("fsdp" in layout or layout == PAGE))
]


@pytest.fixture(scope="module")
def on_eight_devices(tmp_path_factory):
    return of_process(tmp_path_factory, "meshes", "-m", "tests.on_eight_devices")


@pytest.fixture
def found(on_eight_devices):
    return on_eight_devices["steps"]


def total(collectives, operation=None):
    return sum(size * n for name, size, n in collectives if operation in (None, name))


@pytest.mark.parametrize(("layout", "path"), ROWS)
def test_twenty_steps_end_where_one_device_does(found, layout, path):
    row = found[layout][path]
    assert "error" not in row
    assert row["deviation"] <= 1e-5


@pytest.mark.parametrize("layout", ["data parallel", "data parallel, explicit", "shard_map"])
def test_data_parallel_reduces_each_measured_gradient_once(found, layout):
    gradient = TRUNK + K * HEAD
    rows = {path: found[layout][path]["collectives"] for path in ("plain", "stacked", "lagged")}
    assert rows == {
        "plain": [["all-reduce", gradient, 1]],
        "stacked": [["all-reduce", K * TRUNK + K * HEAD, 1]],  # a head has one task's gradient
        "lagged": [["all-reduce", gradient, K]],
    }


@pytest.mark.parametrize("path", EXACT)
@pytest.mark.parametrize("layout", ["data parallel", "data parallel, explicit"])
def test_factors_are_gathered_instead_of_gradients_reduced(found, layout, path):
    """Of the kernels one gradient is reduced, that of the update: this is measured on factors."""
    moved = found[layout][path]["collectives"]
    assert TRUNK <= total(moved, "all-reduce") <= TRUNK + K * HEAD + SMALL
    assert total(moved, "all-gather") > 0


# With columns of a kernel on several devices the rows' norms, [K, n], are reduced over them, which
# stacked gradients do without; with rows on others too, factors are gathered over both.
MORE = {"tensor parallel": 1.02, "2 x 4": 1.26}


@pytest.mark.parametrize("path", ["slices", "slices, cosines"])
@pytest.mark.parametrize("layout", ["data parallel", "data parallel, explicit"])
def test_slices_that_are_split_over_devices_reduce_the_update_once(found, layout, path):
    kernels = [row for row in found[layout][path]["collectives"] if row[1] >= TRUNK]
    assert kernels == [["all-reduce", TRUNK, 1]]


@pytest.mark.parametrize("path", EXACT)
@pytest.mark.parametrize("layout", [*LAYOUTS, "shard_map", PAGE])
def test_exact_moves_at_most_what_stacked_gradients_do(found, layout, path):
    """In bytes of all collectives together; on sharded columns little more."""
    moved, stacked = (found[layout][name]["collectives"] for name in (path, "stacked"))
    assert "all-to-all" not in {operation for operation, *_ in moved}
    assert total(moved) <= MORE.get(layout.removesuffix(", explicit"), 1) * total(stacked)


@pytest.mark.parametrize(("layout", "path"), GATHERED)
def test_sharded_parameters_are_gathered_as_in_a_plain_step(found, layout, path):
    """No all-to-all, and never a stack of gradients: what is moved more is the reduction."""
    plain, moved = found[layout]["plain"]["collectives"], found[layout][path]["collectives"]
    assert {operation for operation, *_ in moved} <= {"all-reduce", "all-gather"}
    gathers, expected = (
        Counter({size: n for operation, size, n in row if operation == "all-gather"})
        for row in (moved, plain)
    )
    if path in EXACT:  # which gathers factors too
        gathers = Counter({size: n for size, n in gathers.items() if size in expected})
    assert gathers == expected
    assert total(moved, "all-reduce") <= K * total(plain, "all-reduce") + SMALL


def test_sharded_kernels_are_gathered_at_all(found):
    """Else the test above compares nothing."""
    for layout in ("fsdp", "fsdp, explicit", "tensor parallel", "2 x 4"):
        assert total(found[layout]["plain"]["collectives"], "all-gather") > 0
    assert ["all-gather", 4 * WIDE * WIDE, 2] in found[PAGE]["plain"]["collectives"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", ["fsdp", "fsdp, explicit"])
def test_state_lies_with_the_parameters_and_stays_there(on_eight_devices, layout, optimizer):
    state = dict(on_eight_devices["states"][f"{layout}, {optimizer}"])
    moments = {"adamw": 2, "TaskMultiSteps": 2}.get(optimizer, 1)
    assert state.pop("kernels") == 2 * moments
    assert state.pop("at first") == []
    if (layout, optimizer) == ("fsdp, explicit", "muon"):  # of optax, as the page says
        assert state == {"error": "ShardingTypeError"}
    else:
        assert state == {"after": [], "traces": 1}


@pytest.mark.parametrize("path", ["exact", "lagged"])
def test_losses_that_were_not_averaged_over_the_devices(path):
    params, [batch, *_] = init()
    step, parts = make_step(path, make_losses())
    step = jax.shard_map(
        step,
        mesh=jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    carry = (params, *(part.init(params) for part in parts))
    with pytest.raises(
        ValueError, match=r"differ along \['data'\].*lax.pmean\(loss, \('data',\)\)"
    ):
        jax.eval_shape(step, carry, *batch)


@pytest.mark.parametrize("options", [{}, {"measure": "lagged"}, {"every": 2}])
def test_pmap_raises(options):
    """There each device would have weights of its own, and nothing tells."""
    params, [batch, *_] = init()
    balanced = balanced_value_and_grad(make_losses(), weighting.gaba(K), **options)
    step = jax.pmap(balanced.value_and_grad, axis_name="data", in_axes=(None, None, 0, 0))
    parts = [part[None] for part in batch]
    with pytest.raises(ValueError, match=r"along \['data'\].*pmean.*per_device=True"):
        step(params, balanced.init(params), *parts)


def test_a_model_on_each_device_without_the_check():
    """What the error names for it: weights of its own per device."""
    rule = weighting.gaba(K, warmup_steps=0, min_weight=0.0, debias=True)
    params, [batch, *_] = init()

    def make_step(**options):
        balanced = balanced_value_and_grad(make_losses(), rule, **options)
        arguments = params, balanced.init(params), *batch
        return balanced.value_and_grad, arguments

    step, arguments = make_step()
    alone = jax.jit(step)(*arguments)

    def on_each(step):
        return jax.jit(
            jax.shard_map(
                lambda *args: jax.tree.map(lambda leaf: leaf[None], step(*args)),
                mesh=jax.make_mesh((1,), ("models",), axis_types=(jax.sharding.AxisType.Auto,)),
                in_specs=(P(), P(), P("models"), P("models")),
                out_specs=P("models"),
                check_vma=False,
            )
        )

    with pytest.raises(ValueError, match=r"along \['models'\].*pmean.*per_device=True"):
        on_each(step)(*arguments)
    per_device = on_each(make_step(per_device=True)[0])(*arguments)
    assert len(batch[0]) == BATCH
    for got, wanted in zip(jax.tree.leaves(per_device), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(got[0], wanted, rtol=1e-5, atol=1e-6)
    assert jnp.ptp(alone[1].task_weights) > 0.1
