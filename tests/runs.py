"""What the tests of training runs share."""

import dataclasses
import functools
import itertools

import jax
import numpy as np

from gaba_jax.turbofan import train as training

make_weighting, make_program = training.make_weighting, training.make_program
PROGRAMS = {}  # of the session, with the rules that they hold


@functools.cache
def make_rule_once(weighting, gaba):
    return make_weighting(training.TrainConfig(weighting=weighting, gaba=gaba))


def make_program_once(config, rule, shape, steps):
    config = dataclasses.replace(config, seed=0, data=None)  # of which a program knows nothing
    quickly = jax.config.read("jax_disable_most_optimizations")
    key = config, id(rule), shape, steps, quickly
    if key not in PROGRAMS:
        PROGRAMS[key] = rule, make_program(config, rule, shape, steps)
    return PROGRAMS[key][1]


def share_programs(patch):
    """Runs of one configuration share their program, as they would share nothing else."""
    patch.setattr(training, "make_program", make_program_once)
    patch.setattr(
        training, "make_weighting", lambda config: make_rule_once(config.weighting, config.gaba)
    )


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
