# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gaba-jax/gaba_jax/blob/main/notebooks/quickstart.ipynb)
#
# From three losses to a balanced run. The model and the data are made here and are small: every
# cell takes seconds.

# %%
try:
    import gaba_jax
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "gaba_jax is not on PyPI yet. In a checkout of it: pip install -e . matplotlib"
    ) from error

print("gaba_jax", gaba_jax.__version__)

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gaba_jax import (
    balance,
    balance_metrics,
    equalize,
    plot,
    task_names,
    task_value_and_grad,
    weighting,
)

# %matplotlib inline
STEPS = 2000

# %% [markdown]
# ## Three losses on one model
#
# One trunk, three heads, three regressions. The labels of `loud` are ten times larger than those of
# `middle`, and those are ten times larger than the labels of `quiet`, as if they were in
# millimetres, centimetres and decimetres. So each loss is 100 times larger than the next. Otherwise
# the tasks are equally hard.


# %%
def make_data(key, count):
    x = jax.random.normal(key, (count, 4))
    loud, middle = 10 * jnp.sin(2 * x[:, 0] + x[:, 1]), jnp.sin(2 * x[:, 2] + x[:, 3])
    return x, loud, middle, 0.1 * jnp.sin(2 * x[:, 1] - x[:, 2])


def init_params(key):
    keys = jax.random.split(key, 5)
    return {
        "trunk_0": jax.random.normal(keys[0], (4, 32)) / 2,
        "trunk_1": jax.random.normal(keys[1], (32, 32)) / 6,
        "loud_head": jax.random.normal(keys[2], (32,)) / 6,
        "middle_head": jax.random.normal(keys[3], (32,)) / 6,
        "quiet_head": jax.random.normal(keys[4], (32,)) / 60,
    }


def losses_fn(params, x, loud, middle, quiet):
    h = jnp.tanh(jnp.tanh(x @ params["trunk_0"]) @ params["trunk_1"])
    return {
        "loud": jnp.mean((h @ params["loud_head"] - loud) ** 2),
        "middle": jnp.mean((h @ params["middle_head"] - middle) ** 2),
        "quiet": jnp.mean((h @ params["quiet_head"] - quiet) ** 2),
    }


train_data = make_data(jax.random.key(0), 1024)
test_data = make_data(jax.random.key(1), 1024)
start = init_params(jax.random.key(2))
names = task_names(losses_fn(start, *train_data))
print(names)

# %% [markdown]
# The function returns the losses apart, never their sum. That is all that the library asks for.
#
# ## How far apart are they?
#
# `task_value_and_grad` gives the losses and one gradient per task. A balancer measures the
# gradients, and `balance_metrics` reads what it measured.

# %%
losses, grads = task_value_and_grad(losses_fn)(start, *train_data)
balancer = equalize(3)
_, state = balancer.update(grads, balancer.init(start), start)
first = balance_metrics(state, names)
for key, value in first.items():
    print(f"{key:20}{value:.3f}")

# %% [markdown]
# `gradient_ratio` is the largest norm over the smallest one, on the shared parameters. Which those
# are was found from the gradients. `imbalance` is what is left of the ratio after weighting: 1 is
# even.
#
# ## A training loop
#
# The balancer goes first in the chain; after it comes any optimizer. The loop below returns the
# metrics of every update, since `balance_metrics` also works under `jit`.


# %%
def train(balancer, params=start):
    tx = optax.chain(balancer, optax.adam(3e-3))

    def step(carry, key):
        params, opt_state = carry
        rows = jax.random.randint(key, (128,), 0, 1024)
        batch = [column[rows] for column in train_data]
        _, grads = task_value_and_grad(losses_fn)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = balance_metrics(opt_state, names)
        return (optax.apply_updates(params, updates), opt_state), metrics

    keys = jax.random.split(jax.random.key(3), STEPS)
    (params, _), history = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(
        (params, tx.init(params))
    )
    return params, history


# %% [markdown]
# ## Without balancing, and with it
#
# Equal weights are the usual sum of the losses. Here they are written as `inverse_norm` with power
# 0, which gives equal weights and still measures the norms, so that there is something to plot.

# %%
equal_params, equal = train(balance(weighting.inverse_norm(3, power=0)))
balanced_params, balanced = train(balancer)

# %% [markdown]
# With equal weights the loud task pulls many times harder all the time. Left: the norms. Middle:
# their ratio, which weighting leaves as it is. Right: the weights.


# %%
def columns(history, kind):
    return np.stack([history[f"{kind}/{name}"] for name in names], axis=1)


plot.balance_history(columns(equal, "norm"), columns(equal, "weight"), names)

# %% [markdown]
# Equalized, the weights follow the norms, and the weighted gradients (green) stay close to even.

# %%
plot.balance_history(columns(balanced, "norm"), columns(balanced, "weight"), names)

# %% [markdown]
# ## Did it help?
#
# The loss on fresh data over the variance of the labels: 0 is perfect, 1 is guessing the mean. The
# labels' scale drops out, so that the three tasks compare.


# %%
def unexplained(params):
    losses = losses_fn(params, *test_data)
    return {
        name: float(losses[name] / jnp.var(label))
        for name, label in zip(names, test_data[1:], strict=True)
    }


scores = {"equal": unexplained(equal_params), "equalize": unexplained(balanced_params)}
for method, score in scores.items():
    print(f"{method:9}", {name: round(value, 4) for name, value in score.items()})

# %% [markdown]
# With equal weights the quiet task is not learned at all. Here balancing brings its error down to
# less than a tenth, and that of the middle one to less than half. It costs the loud task about half
# as much error again. It is a trade, and which of the tasks matters more is for you to say:
# `equalize(3, ratios=(2, 1, 1))` asks for twice the contribution of the first one.
#
# This is one small problem and one seed. On your own, measure: `gaba_jax.diagnose` says before
# training how far apart the gradients are.
#
# ## What to read next
#
# - [Use it with](https://github.com/gaba-jax/gaba_jax/blob/main/docs/use_it_with.md):
#   Flax, Equinox, optax's wrappers, tasks without labels, and mistakes that nobody sees.
# - [Weightings](https://github.com/gaba-jax/gaba_jax/blob/main/docs/weightings.md): all rules,
#   what they guarantee and what they cost.
# - `balanced_value_and_grad`: the same weights from a cheaper step, without K gradients in memory.
# - The notebooks `balancing_explorer`, `turbofan` and `physics_informed`.
#
# The cell below fails if what is said above no longer holds.

# %%
assert first["gradient_ratio"] > 5
assert np.isclose(first["imbalance"], 1, rtol=1e-4)
assert np.median(equal["gradient_ratio"]) > 5
assert np.allclose(equal["imbalance"], equal["gradient_ratio"], rtol=1e-4)
assert np.median(balanced["imbalance"]) < 2
assert scores["equalize"]["quiet"] < 0.1 * scores["equal"]["quiet"]
assert scores["equalize"]["middle"] < 0.5 * scores["equal"]["middle"]
assert scores["equalize"]["loud"] < 2 * scores["equal"]["loud"] < 0.1
