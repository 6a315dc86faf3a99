"""The compact model and its training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gaba_jax.turbofan import config
from gaba_jax.turbofan.model import CompactModel
from gaba_jax.turbofan.train import TrainConfig, load_data, make_weighting, train
from tests.on_eight_devices import of_process

pytestmark = pytest.mark.usefixtures("compiled_once")
SMALL = TrainConfig(epochs=2, stride=10)


@pytest.mark.parametrize(("window", "channels"), [(30, 17), (20, 14)])
def test_model_shapes_and_names(window, channels):
    model = CompactModel(window, channels, rngs=nnx.Rngs(0))
    rul, logits = model(jnp.ones((5, window, channels)))
    assert rul.shape == (5,)
    assert logits.shape == (5, 3)
    assert {"backbone", "rul_head", "health_head"} == set(nnx.state(model, nnx.Param))


def test_filters_are_shared_by_the_channels():
    backbone = CompactModel(30, 14, rngs=nnx.Rngs(0)).backbone
    assert backbone.temporal_filters.kernel.shape == (30, 32)
    x = jax.random.normal(jax.random.key(0), (2, 30, 14))
    filtered = backbone.temporal_filters(jnp.swapaxes(x, 1, 2))
    alone = backbone.temporal_filters(x[:, :, 3])
    np.testing.assert_allclose(filtered[:, 3], alone, rtol=1e-5, atol=1e-6)


def test_rules_of_the_command_are_those_of_the_library():
    rules = config.rules()
    assert {"gaba", "uniform", "upgrad"} <= set(rules)
    for name in rules:
        rule = make_weighting(dataclasses.replace(SMALL, weighting=name))
        assert rule.num_tasks == 2
        assert "norms" in rule.needs


@pytest.mark.slow
def test_training_lowers_both_losses_and_reports_every_update():
    records = []
    run = train(load_data(SMALL), SMALL, records.append)
    assert [record.epoch for record in records] == [1, 2]
    for record in records:
        assert record.task_norms.shape == record.task_weights.shape == record.losses.shape
        assert (record.task_norms > 0).all()
    first, last = run.records[0].losses[0], run.records[-1].losses[-1]
    assert (last < first).all()
    assert run.summary["updates"] == sum(len(record.losses) for record in records)
    assert set(run.summary["test"]) == set(run.summary["validation"])


NAMED = """
import dataclasses, json
from tests.turbofan.test_train import SMALL, load_data, train

data = load_data(SMALL)
runs = [train(data, SMALL), train(data, dataclasses.replace(SMALL, shared=("backbone",)))]
print(json.dumps([run.records[-1].task_norms.tolist() for run in runs]))
"""


@pytest.mark.slow
def test_named_sharing_equals_what_the_gradients_tell(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # to the last bit with XLA's own code
    automatic, named = of_process(tmp_path_factory, "sharing", "-c", NAMED)
    assert automatic == named


def test_fd001_reaches_the_promised_figures(cmapss):
    """Mean of three seeds; weights by the published gaba, and what equal weights leave."""
    config = TrainConfig(data=cmapss)
    runs = [
        train(load_data(seeded), seeded).summary
        for seeded in (dataclasses.replace(config, seed=seed) for seed in range(3))
    ]
    assert np.mean([run["test"]["rmse"] for run in runs]) <= 15.5
    assert np.mean([run["test"]["health_accuracy"] for run in runs]) >= 0.83
    assert np.mean([run["gradient_ratio"]["median"] for run in runs]) > 100
    assert np.mean([run["contribution_ratio"]["median"] for run in runs]) < 12
    uniform = dataclasses.replace(config, weighting="uniform")
    unbalanced = train(load_data(uniform), uniform).summary
    assert unbalanced["contribution_ratio"]["median"] > 100
