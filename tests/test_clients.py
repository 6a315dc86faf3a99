"""Codebases that train with this library inside; each is skipped where it is not installed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gaba_jax import balance_metrics
from tests import pages

PAGE = Path(__file__).parent.parent / "docs" / "physics_informed.md"


def block():
    (found,) = [each for each in pages.blocks(PAGE.read_text()) if "jinns.solve" in each]
    return found


def test_the_page_says_how_to_train_within_jinns():
    compile(block(), str(PAGE), "exec")
    assert "optax.chain(equalize(2), optax.adam(3e-3))" in block()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of jinns's own modules
def test_jinns():
    """Its own solver, with the gradients of its loss terms balanced in the optimizer's chain."""
    pytest.importorskip("jinns", reason="needs the extra clients")
    names = {}
    exec(compile(block(), str(PAGE), "exec"), names)
    t = jnp.linspace(0.0, 2.0, 50)[:, None]
    found = jax.vmap(lambda t: names["u"](t, names["trained"]))(t)
    assert jnp.linalg.norm(found - jnp.exp(-3 * t)) < 0.01 * jnp.linalg.norm(jnp.exp(-3 * t))
    metrics = balance_metrics(names["opt_state"])
    assert metrics["imbalance"] < 3 < metrics["gradient_ratio"]
