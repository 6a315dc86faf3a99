"""The two small problems that every rule is tried on, and that no rule is missing from the JSON."""

import json

import jax
import numpy as np
import pytest

from benchmarks import toy
from gaba_jax.turbofan import config

jacobians = jax.jit(jax.vmap(jax.jacobian(toy.landscape)))


def test_gradients_of_the_landscape_are_finite():
    rng = np.random.default_rng(0)
    points = np.concatenate([toy.STARTS, [[-5, 8], [9, 8]], rng.uniform(-12, 12, (500, 2))])
    losses = toy.all_losses(points)
    assert np.isfinite(losses).all()
    assert (losses > toy.LOWER_BOUND).all()
    assert np.isfinite(jacobians(np.float32(points))).all()


@pytest.mark.slow
def test_nothing_is_better_than_the_front():
    points, losses = toy.front()
    first, second = np.moveaxis(np.asarray(jacobians(points))[1:-1], 1, 0)  # zero at the ends
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    np.testing.assert_allclose((first * second).sum(axis=1) / lengths, -1, atol=1e-3)
    grid = np.stack(np.meshgrid(*[np.linspace(-12, 12, 61)] * 2), -1).reshape(-1, 2)
    # Between its points, 0.01 apart, the front is a little better than at them.
    assert (toy.above_front(toy.all_losses(grid), losses) > -0.02).all()
    np.testing.assert_allclose(toy.above_front(losses + 3, losses), 3, rtol=1e-4)


def test_overlays():
    train, test = toy.overlay_digits(partners=2)
    assert not set(train.sources.ravel()) & set(test.sources.ravel())
    assert len(set(train.sources.ravel()) | set(test.sources.ravel())) == 1797
    for split in (train, test):
        count = len(split.images)
        assert split.images.shape == (count, toy.SIDE, toy.SIDE)
        assert split.labels.shape == split.sources.shape == (count, 2)
        assert split.images.min() == 0
        assert split.images.max() == 1
        assert set(split.labels.ravel()) == set(range(10))


@pytest.mark.slow
def test_quick(tmp_path, capsys):
    out, picture = tmp_path / "toy.json", tmp_path / "images" / "toy.png"
    toy.main(quick=True, out=out, picture=picture)
    results = json.loads(out.read_text())["results"]
    assert set(results) == {"gaba", "uniform"}
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(table in printed for table in toy.tables(results))
    assert all(np.shape(runs) == (2, 2) for runs in results["gaba"]["digits"].values())


def test_every_rule_is_in_the_results():
    results = json.loads(toy.RESULT.read_text())["results"]
    assert set(config.rules()) <= set(results)
    for table in toy.tables(results):
        assert all(f"| `{name}` |" in table for name in results)
