"""What the tests of training runs share."""

import itertools

import jax
import numpy as np


def after(chunks):
    """A ``stop`` of checkpoints that is True from the given question on."""
    asked = itertools.count(1)
    return lambda: next(asked) >= chunks


def assert_same_run(one, other):
    """Bitwise the same parameters, statistics and records; the same summary but for the timing."""
    for name in ("params", "stats"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(other, name))
    for a, b in zip(one.records, other.records, strict=True):
        assert a.scalars == b.scalars
        for name in ("losses", "task_norms", "task_weights"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert {**one.summary, "timing": 0} == {**other.summary, "timing": 0}
