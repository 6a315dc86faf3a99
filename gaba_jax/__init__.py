"""Balances the gradients of several losses that share one model, as an optax transform.

Put :func:`gaba` first in the chain and feed it one gradient per task:

>>> import jax
>>> import jax.numpy as jnp
>>> import optax
>>> from gaba_jax import gaba, task_value_and_grad
>>>
>>> def losses_fn(params, x):
...     h = jnp.tanh(x @ params["backbone"])
...     return 500.0 * jnp.mean((h @ params["a"] - 1) ** 2), jnp.mean((h @ params["b"]) ** 2)
>>>
>>> params = {"backbone": jnp.ones((3, 2)), "a": jnp.ones(2), "b": jnp.ones(2)}
>>> tx = optax.chain(gaba(warmup_steps=0, debias=True), optax.adamw(1e-3))
>>> opt_state = tx.init(params)
>>> losses, grads = task_value_and_grad(losses_fn)(params, jnp.ones((4, 3)))
>>> updates, opt_state = tx.update(grads, opt_state, params)
>>> params = optax.apply_updates(params, updates)
>>> print(optax.tree.get(opt_state, "task_weights").round(2))  # the loud task is held down
[0.05 0.95]

:func:`balanced_value_and_grad` does the same in the memory of one gradient.

Where every task has examples of its own, or every example is a task, its ``in_axes`` takes them all
in one backward pass; :func:`example_norms` measures single examples.

Whether that is worth it, :func:`diagnose` says before training.

Where things are: the rules in :mod:`gaba_jax.weighting`; what to log in
:func:`balance_metrics`; the method seen as a feedback loop in :mod:`gaba_jax.controller`; the
turbofan application, an extra, in ``gaba_jax.turbofan``.
"""

from importlib.metadata import version

from gaba_jax import controller, monitor, weighting
from gaba_jax._accumulate import TaskMultiSteps
from gaba_jax._aggregators import grad_drop, trimmed_mean
from gaba_jax._balanced import BalancedGradient, balanced_value_and_grad
from gaba_jax._diagnose import diagnose
from gaba_jax._example_norms import example_norms
from gaba_jax._findings import Diagnosis
from gaba_jax._per_task import per_task
from gaba_jax._selection import exclude, group_names, only
from gaba_jax._state import BalanceState
from gaba_jax._task_norms import task_norms
from gaba_jax._transform import balance, by_group, equalize, gaba, gradnorm
from gaba_jax._value_and_grad import task_names, task_value_and_grad
from gaba_jax.monitor import balance_metrics
from gaba_jax.weighting import TaskStats, Weighting

__version__ = version("gaba-jax")

__all__ = [
    "BalanceState",
    "BalancedGradient",
    "Diagnosis",
    "TaskMultiSteps",
    "TaskStats",
    "Weighting",
    "balance",
    "balance_metrics",
    "balanced_value_and_grad",
    "by_group",
    "controller",
    "diagnose",
    "equalize",
    "example_norms",
    "exclude",
    "gaba",
    "grad_drop",
    "gradnorm",
    "group_names",
    "monitor",
    "only",
    "per_task",
    "task_names",
    "task_norms",
    "task_value_and_grad",
    "trimmed_mean",
    "weighting",
]
