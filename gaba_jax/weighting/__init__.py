"""The rules: pure functions from what was measured on K task gradients to K task weights.

A rule is made by calling it with the number of tasks, and runs in :func:`gaba_jax.balance`:

>>> import optax
>>> from gaba_jax import balance, weighting
>>> rule = weighting.stabilize(weighting.inverse_norm(3), beta=0.9, warmup_steps=10)
>>> tx = optax.chain(balance(rule), optax.adamw(1e-3))
"""

from gaba_jax._statistics import Statistic, TaskStats
from gaba_jax.weighting._aligned_mtl import aligned_mtl
from gaba_jax.weighting._average_norms import NormAverageState, average_norms
from gaba_jax.weighting._base import Weighting
from gaba_jax.weighting._cagrad import cagrad
from gaba_jax.weighting._conflict_free import config
from gaba_jax.weighting._constant import constant
from gaba_jax.weighting._dual_projection import dual_projection
from gaba_jax.weighting._dynamic_weight_average import (
    DynamicWeightAverageState,
    dynamic_weight_average,
)
from gaba_jax.weighting._element_statistics import max_abs, mean_abs, std
from gaba_jax.weighting._equalize import EqualizeState, equalize
from gaba_jax.weighting._fairgrad import fairgrad
from gaba_jax.weighting._famo import FamoState, famo
from gaba_jax.weighting._gaba import gaba
from gaba_jax.weighting._geometric_mean import geometric_mean
from gaba_jax.weighting._gradnorm import GradNormState, gradnorm, gradnorm_balance_point
from gaba_jax.weighting._gradvac import GradVacState, gradvac
from gaba_jax.weighting._gramian import SolverState
from gaba_jax.weighting._hold_after import HoldAfterState, hold_after
from gaba_jax.weighting._imtl_g import imtl_g
from gaba_jax.weighting._inverse_dirichlet import inverse_dirichlet
from gaba_jax.weighting._inverse_norm import inverse_norm
from gaba_jax.weighting._inverse_share import inverse_share
from gaba_jax.weighting._krum import krum
from gaba_jax.weighting._lr_annealing import AnnealedState, lr_annealing
from gaba_jax.weighting._mgda import mgda
from gaba_jax.weighting._nash_mtl import nash_mtl
from gaba_jax.weighting._normalized import normalized
from gaba_jax.weighting._ntk import NtkState, ntk
from gaba_jax.weighting._pcd import PcdState, pcd
from gaba_jax.weighting._pcgrad import pcgrad
from gaba_jax.weighting._proportional_integral import (
    ProportionalIntegralState,
    proportional_integral,
)
from gaba_jax.weighting._random import RandomState, random
from gaba_jax.weighting._relobralo import RelobraloState, relobralo
from gaba_jax.weighting._rescaled import rescaled
from gaba_jax.weighting._scale_invariant import scale_invariant
from gaba_jax.weighting._smooth_tchebycheff import smooth_tchebycheff
from gaba_jax.weighting._soft_adapt import SoftAdaptState, soft_adapt
from gaba_jax.weighting._stabilize import StabilizeState, stabilize
from gaba_jax.weighting._uncertainty_imtl_l import UncertaintyState, imtl_l, uncertainty
from gaba_jax.weighting._uniform import uniform
from gaba_jax.weighting._upgrad import upgrad

__all__ = [
    "AnnealedState",
    "DynamicWeightAverageState",
    "EqualizeState",
    "FamoState",
    "GradNormState",
    "GradVacState",
    "HoldAfterState",
    "NormAverageState",
    "NtkState",
    "PcdState",
    "ProportionalIntegralState",
    "RandomState",
    "RelobraloState",
    "SoftAdaptState",
    "SolverState",
    "StabilizeState",
    "Statistic",
    "TaskStats",
    "UncertaintyState",
    "Weighting",
    "aligned_mtl",
    "average_norms",
    "cagrad",
    "config",
    "constant",
    "dual_projection",
    "dynamic_weight_average",
    "equalize",
    "fairgrad",
    "famo",
    "gaba",
    "geometric_mean",
    "gradnorm",
    "gradnorm_balance_point",
    "gradvac",
    "hold_after",
    "imtl_g",
    "imtl_l",
    "inverse_dirichlet",
    "inverse_norm",
    "inverse_share",
    "krum",
    "lr_annealing",
    "max_abs",
    "mean_abs",
    "mgda",
    "nash_mtl",
    "normalized",
    "ntk",
    "pcd",
    "pcgrad",
    "proportional_integral",
    "random",
    "relobralo",
    "rescaled",
    "scale_invariant",
    "smooth_tchebycheff",
    "soft_adapt",
    "stabilize",
    "std",
    "uncertainty",
    "uniform",
    "upgrad",
]
