"""The rules: pure functions from what was measured on K task gradients to K task weights.

A rule is made by calling it with the number of tasks, and runs in :func:`gaba_jax.balance`:

>>> import optax
>>> from gaba_jax import balance, weighting
>>> rule = weighting.stabilize(weighting.inverse_norm(3), beta=0.9, warmup_steps=10)
>>> tx = optax.chain(balance(rule), optax.adamw(1e-3))
"""

from gaba_jax._stats import TaskStats
from gaba_jax.weighting._base import Weighting
from gaba_jax.weighting._constant import constant
from gaba_jax.weighting._dynamic_weight_average import (
    DynamicWeightAverageState,
    dynamic_weight_average,
)
from gaba_jax.weighting._gaba import gaba
from gaba_jax.weighting._gradnorm import GradNormState, gradnorm, gradnorm_balance_point
from gaba_jax.weighting._inverse_norm import inverse_norm
from gaba_jax.weighting._inverse_share import inverse_share
from gaba_jax.weighting._random import RandomState, random
from gaba_jax.weighting._rescaled import rescaled
from gaba_jax.weighting._stabilize import StabilizeState, stabilize
from gaba_jax.weighting._uncertainty import UncertaintyState, uncertainty
from gaba_jax.weighting._uniform import uniform

__all__ = [
    "DynamicWeightAverageState",
    "GradNormState",
    "RandomState",
    "StabilizeState",
    "TaskStats",
    "UncertaintyState",
    "Weighting",
    "constant",
    "dynamic_weight_average",
    "gaba",
    "gradnorm",
    "gradnorm_balance_point",
    "inverse_norm",
    "inverse_share",
    "random",
    "rescaled",
    "stabilize",
    "uncertainty",
    "uniform",
]
