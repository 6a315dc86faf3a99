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
# # Balancing explorer
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gaba-jax/gaba_jax/blob/main/notebooks/balancing_explorer.ipynb)
#
# Six panels to play with. Run all cells, then move the sliders by mouse or with the arrow keys:
# every weight is computed by `gaba_jax` itself. Where there is no kernel, as in the
# documentation, a still picture stands for each panel, with its settings below it.

# %%
try:
    import gaba_jax
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "gaba_jax is not on PyPI yet. In a checkout of it: pip install -e . ipywidgets matplotlib"
    ) from error

# %%
import base64
import html
import io
import textwrap
from functools import cache, partial

import ipywidgets as widgets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from PIL import Image

from gaba_jax import (
    balance,
    balance_metrics,
    controller,
    gaba,
    gradnorm,
    monitor,
    task_value_and_grad,
    weighting,
)
from gaba_jax.plot import COLORS

TASKS = ("RUL", "health")
print("gaba_jax", gaba_jax.__version__)

# %% [markdown]
# What the panels are made of: controls, a picture, and its numbers as a table. No weight is
# computed in this cell.


# %% tags=["hide-input"]
class Panel:
    """Controls by name; ``show(**values)`` returns a picture and a table for their values.

    Displayed it is widgets where a kernel answers, elsewhere the picture.
    """

    def __init__(self, css_class, show, **controls):
        self.css_class, self.show, self.controls = css_class, show, controls
        for control in controls.values():
            buttons = isinstance(control, widgets.ToggleButtons)
            control.style.description_width = "10em"
            control.layout = widgets.Layout(width="auto" if buttons else "26em", max_width="100%")
            if hasattr(control, "continuous_update"):
                control.continuous_update = False  # one picture a move, not one a pixel
            control.observe(self.refresh, names="value")
        # Where the page is narrow they scroll, so that they can still be read.
        scrolled = {"width": "100%", "max_width": "800px", "overflow": "auto"}
        self.picture, self.numbers = widgets.HTML(layout=scrolled), widgets.HTML(layout=scrolled)
        self.refresh()
        in_rows = widgets.Layout(flex_flow="row wrap", max_width="800px")
        rows = [widgets.Box(list(controls.values()), layout=in_rows), self.picture, self.numbers]
        self.box = widgets.VBox(rows)
        self.box.add_class(css_class)

    def settings(self):
        """The values of the controls, as the picture says them."""
        said, ticked = [], []
        for control in self.controls.values():
            if isinstance(control, widgets.Checkbox):
                ticked += [control.description] * control.value
            elif control.value is not None:
                chosen = getattr(control, "label", None) or format(control.value, ".4g")
                said.append(f"{control.description} {chosen}")
        return said + [f"ticked: {', '.join(ticked)}"] * bool(ticked)

    def refresh(self, _=None):
        try:
            self.drawn, numbers = self.show(**{name: c.value for name, c in self.controls.items()})
        except ValueError as error:  # what the library has against these values
            self.picture.value = ""
            self.numbers.value = f'<p class="refused">{html.escape(str(error))}</p>'
            return
        self.alt = f"{self.css_class}, at {', '.join(self.settings())}"
        lines = textwrap.wrap("at  " + "  ·  ".join(self.settings()), 118)
        if isinstance(self.drawn, Figure):
            inches = self.drawn.get_figheight()
            for i, line in enumerate(reversed(lines)):
                place = (0.06 + 0.16 * i) / inches
                self.drawn.text(0.012, place, line, fontsize=8, color="0.3")
            self.image = png(self.drawn)
            source = f"data:image/png;base64,{self.encoded()}"
            shown = f'<img alt="{self.alt}" style="width:100%" src="{source}">'
        else:
            words = "".join(f'<tspan x="12" dy="15">{line}</tspan>' for line in lines)
            caption = f'<text y="0" font-size="12" text-anchor="start" fill="#444">{words}</text>'
            shown = self.image = self.drawn.replace("<!-- settings -->", caption)
        self.picture.value = f'<div style="min-width:560px">{shown}</div>'
        self.numbers.value = table(numbers)

    def encoded(self):
        return base64.b64encode(self.image).decode()

    def _repr_mimebundle_(self, **_):
        svg = isinstance(self.image, str)
        still = {"image/svg+xml": self.image} if svg else {"image/png": self.encoded()}
        return self.box._repr_mimebundle_() | still | {"text/plain": self.alt}


def log_slider(name, exponent, low=-3, high=3):
    """Starts at 10**exponent, goes from 10**low to 10**high, ten steps to a factor of ten."""
    return widgets.FloatLogSlider(
        10**exponent, min=low, max=high, step=0.1, description=name, readout_format=".6g"
    )


def odds_slider(name, exponent):
    """Weights w from 0.00001 to 0.99999: w / (1 - w) starts at 10**exponent, in steps as above."""
    words = [f"{1 / (1 + 10 ** (-step / 10)):.6g}" for step in range(-50, 51)]
    options = [(word, float(word)) for word in words]
    start = options[50 + round(10 * exponent)][1]
    return widgets.SelectionSlider(options=options, value=start, description=name)


def float_slider(name, value, low, high, step, digits=2):
    return widgets.FloatSlider(
        value, min=low, max=high, step=step, description=name, readout_format=f".{digits}f"
    )


def int_slider(name, value, low, high):
    return widgets.IntSlider(value, min=low, max=high, description=name)


def choice(name, options, value):
    style = {"button_width": "auto"}
    return widgets.ToggleButtons(options=options, value=value, description=name, style=style)


def table(numbers):
    """Rows of a name and the values of the tasks, or one value, as HTML."""
    rows = []
    for name, values in numbers.items():
        values = [values] if isinstance(values, str) else np.atleast_1d(values).tolist()
        words = [value if isinstance(value, str) else f"{value:.6g}" for value in values]
        cells = "".join(f'<td style="text-align:right;padding-left:1em">{w}</td>' for w in words)
        rows.append(f'<tr data-name="{name}"><td>{name}</td>{cells}</tr>')
    style = "line-height:1.5;white-space:nowrap;font-variant-numeric:tabular-nums"
    return f'<table style="{style}">{"".join(rows)}</table>'


def canvas(*titles, height=3.3, **grid):
    """A figure of plain axes, with titles on the first row and room below for the settings."""
    figure = Figure(figsize=(8, height))  # with fixed margins: a layout engine doubles the time
    top, bottom = 1 - 0.66 / height, 0.8 / height
    figure.subplots_adjust(left=0.075, right=0.985, bottom=bottom, top=top, wspace=0.3)
    every = figure.subplots(ncols=len(titles), squeeze=False, **grid)
    above = 1 + 0.2 * len(every) / (height - 1.46)  # a given y spares the search for one
    for axes, title in zip(every[0], titles, strict=True):
        axes.set_title(title, fontsize=10, loc="left", y=above)
    for axes in every.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, every.flatten()


def bars(axes, places, series):
    """A cluster of bars a place, one color a name of ``series``, and the values on them."""
    width = 0.84 / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = np.arange(len(places)) + (i - (len(series) - 1) / 2) * width
        drawn = axes.bar(at, np.asarray(values), width * 0.92, color=COLORS[i], label=name)
        if len(places) * len(series) <= 8:
            short = [f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in values]
            axes.bar_label(drawn, short, fontsize=8, padding=1)
    axes.set_xticks(range(len(places)), places)
    axes.grid(visible=False, axis="x")


def log_axis(axes, values, room=1.5):
    """A y axis of whole decades, with ``room`` for what is written on the bars."""
    values = np.asarray(values)
    values = values[np.isfinite(values) & (values > 0)]
    if values.size:
        low, high = np.floor(np.log10(values.min() / 1.1)), np.ceil(np.log10(values.max() * room))
        axes.set(yscale="log", ylim=(10**low, 10**high))
    axes.minorticks_off()


def legend(axes):
    """One row, between the title and the picture."""
    above = {"loc": "lower left", "bbox_to_anchor": (-0.03, 0.97), "ncols": 4}
    tight = {"handlelength": 1, "handletextpad": 0.4, "columnspacing": 0.8}
    axes.legend(frameon=False, fontsize=9, **tight, **above)


def png(figure):
    """Of 128 colors, a third of the bytes."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    Image.open(drawn).convert("RGB").quantize(128).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


# %% [markdown]
# ## a. Task balancing
#
# **What it teaches:** the louder a task pulls, the smaller its weight, and weight × norm
# becomes equal.
#
# The closed form weights each task by the share of the *other* in the sum of the norms. Warm-up,
# average and floor take 200 updates, or more, to get there; with `debias` the average starts at
# the first measurement.


# %% tags=["hide-input"]
@partial(jax.jit, static_argnames="debias")
def closed_form_and_200_steps(norms, beta, warmup_steps, min_weight, debias):
    options = {"beta": beta, "warmup_steps": warmup_steps, "min_weight": min_weight}
    closed = controller.simulate(norms, weighting.inverse_share(2), steps=1)
    averaged = controller.simulate(norms, weighting.gaba(2, debias=debias, **options), steps=200)
    return closed, averaged


def show_weights(norm_1, norm_2, beta, warmup_steps, min_weight, debias):
    closed, averaged = closed_form_and_200_steps(
        jnp.array([norm_1, norm_2]), beta, warmup_steps, min_weight, debias
    )
    figure, (left, right) = canvas(
        "norm, and weight × norm", "weight over 200 updates", width_ratios=(1.2, 1)
    )
    stages = [averaged.norms[0], closed.contributions[0], averaged.contributions[-1]]
    bars(
        left,
        ["norm", "closed form", "update 200"],
        dict(zip(TASKS, np.stack(stages).T, strict=True)),
    )
    log_axis(left, stages)
    legend(left)
    for i, task in enumerate(TASKS):
        right.plot(np.arange(1, 201), averaged.weights[:, i], color=COLORS[i], label=task)
        right.axhline(closed.weights[0, i], color=COLORS[i], linestyle=":", linewidth=1)
    right.set(ylim=(-0.03, 1.03))
    right.set_xlabel("update (dotted: the closed form)", fontsize=9)
    legend(right)
    return figure, {
        "task": TASKS,
        "norm": averaged.norms[0],
        "share": averaged.shares[0],
        "weight, closed form": closed.weights[0],
        "weight, update 200": averaged.weights[-1],
        "contribution, closed form": closed.contributions[0],
        "contribution, update 200": averaged.contributions[-1],
        "updates to settle (2 %)": warmup_steps + controller.settling_steps(beta),
    }


Panel(
    "explorer-a",
    show_weights,
    norm_1=log_slider("norm of RUL", 2.4),
    norm_2=log_slider("norm of health", -0.3),
    beta=float_slider("beta", 0.99, 0, 0.995, 0.005, digits=3),
    warmup_steps=int_slider("warm-up", 100, 0, 200),
    min_weight=float_slider("floor", 0.05, 0, 0.5, 0.01),
    debias=widgets.Checkbox(value=False, description="debias", indent=True),
)

# %% [markdown]
# ## b. Where the curves cross
#
# **What it teaches:** there is one weight at which both tasks contribute the same, and GABA
# computes it without a search.
#
# With two tasks one weight $\lambda$ says all: the first contributes $\lambda g_1$, the second
# $(1 - \lambda) g_2$. Drag $\lambda$ to where they cross, and the bars of "yours" are level.
# Uniform weights leave the norms as far apart as they are, the square root halves the distance on
# the log axis.


# %% tags=["hide-input"]
RULES = {
    "uniform": weighting.uniform(2),
    "square root": weighting.inverse_norm(2, power=0.5),
    "GABA": weighting.inverse_share(2),
}


@jax.jit
def three_rules(norms):
    return [controller.simulate(norms, rule, steps=1) for rule in RULES.values()]


@jax.jit
def own_weight(norms, weight):
    rule = weighting.constant(2, jnp.stack([weight, 1 - weight]))
    return controller.simulate(norms, rule, steps=1)


def show_crossing(weight_1, norm_1, norm_2):
    norms = jnp.array([norm_1, norm_2])
    named = {"yours": own_weight(norms, weight_1)} | dict(
        zip(RULES, three_rules(norms), strict=True)
    )
    figure, (left, right) = canvas(
        "contributions by the weight of RUL, λ", "contributions of the rules", width_ratios=(1, 1.2)
    )
    exponents = np.linspace(-14, 14, 400)
    weight = 1 / (1 + np.exp(-exponents))
    left.plot(weight, weight * norm_1, color=COLORS[0], label="λ g₁")
    left.plot(weight, (1 - weight) * norm_2, color=COLORS[1], label="(1 − λ) g₂")
    left.axvline(weight_1, color=COLORS[4], linewidth=1.5)
    for marker, (name, answer) in zip("Dos^", named.items(), strict=True):
        at, of_each = answer.weights[0, 0], answer.contributions[0]
        color = COLORS[4] if name == "yours" else COLORS[6]
        left.plot([at, at], of_each, marker, color=color, markersize=6, linestyle=":")
    left.set(xscale="logit", xlim=(1e-6, 1 - 1e-6))
    ticks = [1e-4, 1e-2, 0.5, 0.99, 0.9999]
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    log_axis(left, [norm_1, norm_2, norm_1 / 1e5, norm_2 / 1e5])
    left.minorticks_off()
    left.tick_params(axis="x", labelsize=8)
    legend(left)
    of_rules = np.stack([answer.contributions[0] for answer in named.values()])
    places = [f"{mark} {name}" for mark, name in zip("◆●■▲", named, strict=True)]
    bars(right, places, dict(zip(TASKS, of_rules.T, strict=True)))
    log_axis(right, of_rules)
    legend(right)
    numbers = {"task": TASKS, "norm": (norm_1, norm_2)}
    for name, answer in named.items():
        numbers[f"weight, {name}"] = answer.weights[0]
        numbers[f"contribution, {name}"] = answer.contributions[0]
    numbers["RUL / health, yours"] = of_rules[0, 0] / of_rules[0, 1]
    return figure, numbers


Panel(
    "explorer-b",
    show_crossing,
    weight_1=odds_slider("weight of RUL, λ", -0.5),
    norm_1=log_slider("norm of RUL", 1.5, low=-2),
    norm_2=log_slider("norm of health", -0.3, low=-2),
)

# %% [markdown]
# ## c. The norms of an update, leaf by leaf
#
# **What it teaches:** a norm is the root of a sum of squares over the parameters that count, so
# that which ones you count decides the weights.
#
# `gaba()` counts what the tasks share, and finds it from the gradients: a leaf on which two tasks
# have one. Here the ticks are handed over as `shared=`. Count a head, and the norm of its own task
# grows, though no other task pulls there. The slider goes through 40 updates of a training.


# %% tags=["hide-input"]
def dual_head(params, x):
    hidden = x
    for layer in params["backbone"].values():
        hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
    return hidden @ params["rul_head"]["kernel"], hidden @ params["health_head"]["kernel"]


def losses_fn(params, x, rul, health):
    predicted, logits = dual_head(params, x)
    crossed = optax.losses.softmax_cross_entropy_with_integer_labels(logits, health)
    return jnp.mean((predicted - rul) ** 2), jnp.mean(crossed)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[0])


x = normal(0, 64, 8) * 8
batch = (x, jnp.clip(70 + 40 * x[:, 0], 0, 125), (x[:, 1] > 0).astype(int) + (x[:, 0] < 0))
params = {
    "backbone": {
        "first": {"bias": jnp.zeros(16), "kernel": normal(1, 8, 16)},
        "last": {"bias": jnp.zeros(8), "kernel": normal(2, 16, 8)},
    },
    "health_head": {"kernel": normal(3, 8, 3)},
    "rul_head": {"kernel": normal(4, 8)},
}


@jax.jit
def gradients_of_training(params):
    """Of a training with the closed form: losses [T, 2] and stacked gradients [T, 2, ...]."""
    tx = optax.chain(balance(weighting.inverse_share(2)), optax.adam(0.03))

    def update(carry, _):
        params, opt_state = carry
        losses, grads = task_value_and_grad(losses_fn)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (losses, grads)

    return jax.lax.scan(update, (params, tx.init(params)), length=40)[1]


every_loss, every_grads = gradients_of_training(params)
first_losses = every_loss[0]
leaves = [
    jax.tree_util.keystr(path, simple=True, separator=".")
    for path, _ in jax.tree.leaves_with_path(params)
]


def squared(grad):
    return np.square(grad).reshape(*grad.shape[:2], -1).sum(axis=-1)


squares = np.stack([squared(grad) for grad in jax.tree.leaves(every_grads)], axis=1)  # [T, leaf, 2]


@cache
def measured(ticks, update=1):
    """The state after this update alone; ticks None: shared leaves found from gradients."""
    mask = ticks and jax.tree.unflatten(jax.tree.structure(params), ticks)
    tx = balance(weighting.inverse_share(2), shared=mask)
    grads = jax.tree.map(lambda grad: grad[update - 1], every_grads)
    return tx.update(grads, tx.init(params), params)[1]


found = np.asarray(measured(None).seen_by_task).all(axis=1)


def show_leaves(update, **ticks):
    ticked = np.array(list(ticks.values()))
    metrics = balance_metrics(measured(tuple(ticks.values()), update), TASKS)
    per_task = {
        key: [metrics[f"{key}/{task}"] for task in TASKS]
        for key in ("norm", "weight", "contribution")
    }
    of_update = squares[update - 1]
    totals = np.cumsum(of_update * ticked[:, None], axis=0)
    figure, (left, middle, right) = canvas(
        "square of each leaf",
        "running total of the ticked",
        "norm: root of the total",
        height=4.4,
        width_ratios=(1.2, 1.2, 1),
    )
    figure.subplots_adjust(left=0.19, wspace=0.14)
    for axes, values in ((left, of_update), (middle, totals)):
        for (place, i), value in np.ndenumerate(values):
            ink = {"color": COLORS[i], "alpha": 1 if ticked[place] else 0.25}
            label = {"label": TASKS[i]} if place == ticked.argmax() else {}
            drawn = axes.barh(place - 0.2 + 0.4 * i, value, 0.36, **ink, **label)
            axes.bar_label(drawn, [f"{value:.2g}"], fontsize=8, padding=2)
        axes.set(xscale="log", xlim=(1e-6, 1e8), ylim=(len(leaves) - 0.5, -0.5))
        axes.set_xticks([1e-4, 1e0, 1e4])
        axes.minorticks_off()
        axes.grid(visible=False, axis="y")
        legend(axes)
    left.set_yticks(range(len(leaves)), leaves)
    middle.set_yticks(range(len(leaves)), [])
    bars(right, ["norm"], dict(zip(TASKS, np.array([per_task["norm"]]).T, strict=True)))
    words = [f"{weight:.3g}" for weight in per_task["weight"]]
    right.set_xticks([-0.21, 0.21], [f"weight\n{word}" for word in words])
    right.set(yscale="log", ylim=(1e-3, 1e4))
    right.minorticks_off()
    right.tick_params(labelleft=False)  # the values are on the bars
    legend(right)
    of_leaves = {f"square, {leaf}": of_update[i] for i, leaf in enumerate(leaves)}
    running = {f"total to {leaf}": totals[i] for i, leaf in enumerate(leaves)}
    return figure, {"task": TASKS} | of_leaves | running | per_task


Panel(
    "explorer-c",
    show_leaves,
    update=int_slider("update", 1, 1, len(squares)),
    **{
        leaf: widgets.Checkbox(value=bool(shared), description=leaf, indent=False)
        for leaf, shared in zip(leaves, found, strict=True)
    },
)

# %% [markdown]
# ## d. GABA against GradNorm
#
# **What it teaches:** GABA makes the contributions equal at once; GradNorm learns its way to more
# for the task that lags behind, and a large step of that learning can end a training.
#
# GradNorm pulls harder on the task whose loss, relative to where it began, lags behind; `alpha`
# says how much harder. At `alpha` = 0, or at equal progress, its balance point is GABA's closed
# form; the table has that point, and what GradNorm (Adam, 0.025) has learned after 200 updates of
# constant norms. *The picture:* the model of panel c with its losses scaled to these norms,
# trained for 100 updates by three rules, both tasks on one scale. "Published" takes a plain SGD
# step on its weights, of 0.05 in the paper, and guards nothing: a step that makes a weight negative
# climbs that loss, the gradient grows, and the next step is larger still. Slide it to 0.5.
#
# Adam, which trains the model, has a scale of its own. The steps of SGD are as small as the
# weighted gradients: under it GABA is slow.


# %% tags=["hide-input"]
def rule_over_time(rule, norms, losses, steps=200):
    """The weights of a rule that needs losses, under constant norms and losses."""
    stats = weighting.TaskStats(norms, None, losses, jnp.ones(2, bool), jnp.int32(1))

    def update(state, _):
        weights, state = rule.update(stats, state)
        return state, weights

    return jax.lax.scan(update, rule.init(), length=steps)[1]


@jax.jit
def learned_and_closed(norms, progress, alpha):
    start = jnp.ones(2)
    learned = weighting.gradnorm(2, alpha=alpha, initial_losses=start)
    return jnp.stack(
        [
            controller.simulate(norms, weighting.inverse_share(2), steps=1).weights[0],
            weighting.gradnorm_balance_point(norms, progress, start, alpha),
            rule_over_time(weighting.rescaled(learned, 1.0), norms, progress)[-1],
        ]
    )


OPTIMIZERS = {"SGD 0.02": optax.sgd(0.02), "Adam 0.03": optax.adam(0.03)}
first_norms = measured(None).task_norms


@partial(jax.jit, static_argnames="optimizer")
def trained(norms, progress, alpha, step, optimizer):
    """Of three trainings, each [3, T, 2]: losses over the first ones, weights and norms."""
    scales = norms / first_norms
    start = {"alpha": alpha, "initial_losses": scales * first_losses / progress}
    brave = {"variant": "published", "weight_optimizer": optax.sgd(step)}

    def scaled_losses(params):
        return tuple(
            scale * loss for scale, loss in zip(scales, losses_fn(params, *batch), strict=True)
        )

    def run(balancing):
        tx = optax.chain(balancing, OPTIMIZERS[optimizer])

        def update(carry, _):
            params, opt_state = carry
            losses, grads = task_value_and_grad(scaled_losses)(params)
            updates, opt_state = tx.update(grads, opt_state, params, task_losses=losses)
            seen = [optax.tree.get(opt_state, key) for key in ("task_weights", "task_norms")]
            return (optax.apply_updates(params, updates), opt_state), (losses, *seen)

        losses, *seen = jax.lax.scan(update, (params, tx.init(params)), length=100)[1]
        return losses / losses[0], *seen

    by_gaba = gaba(beta=0.0, warmup_steps=0, min_weight=0.0)
    runs = [run(each) for each in (by_gaba, gradnorm(**start), gradnorm(**start, **brave))]
    return tuple(map(jnp.stack, zip(*runs, strict=True)))


def show_gradnorm(norm_1, norm_2, progress_1, progress_2, alpha, step, optimizer):
    norms, progress = jnp.array([norm_1, norm_2]), jnp.array([progress_1, progress_2])
    weights = np.asarray(learned_and_closed(norms, progress, alpha))
    losses, applied, pulls = map(np.asarray, trained(norms, progress, alpha, step, optimizer))
    names = ("GABA", "GradNorm", "GradNorm, published")
    figure, every = canvas(*names, height=5.2, nrows=2, sharex=True, sharey="row")
    figure.subplots_adjust(left=0.085, wspace=0.08, hspace=0.12)
    updates = np.arange(1, 101)
    for rows, values in ((every[:3], np.abs(applied * pulls)), (every[3:], losses)):
        for axes, of_rule in zip(rows, values, strict=True):
            for i, task in enumerate(TASKS):
                shown = np.where(of_rule[:, i] > 0, of_rule[:, i], np.nan)
                axes.plot(updates, shown, color=COLORS[i], label=task, linestyle=("-", "--")[i])
    for axes in every[:3]:
        legend(axes)
    for axes in every[3:]:
        axes.set_xlabel("update", fontsize=9)
    scales = (("|weight| × norm", (1e-4, 1e4)), ("loss / first", (1e-3, 1e1)))
    for axes, (label, limits) in zip(every[::3], scales, strict=True):
        axes.set_ylabel(label, fontsize=9)
        axes.set(yscale="log", ylim=limits, xlim=(0, 100), xticks=range(0, 100, 20))
        axes.minorticks_off()
    finite = np.isfinite(losses[2]).all(axis=1)
    if not finite.all():
        words = f"no number after\nupdate {finite.argmin()}"
        every[5].text(0.97, 0.06, words, transform=every[5].transAxes, fontsize=9, ha="right")
    return figure, (
        {"task": TASKS, "norm": norms, "relative progress": progress}
        | dict(
            zip(("weight, GABA", "weight, balance point", "weight, GradNorm"), weights, strict=True)
        )
        | {"published, weight after one step": applied[2, 1]}
        | {"published, least weight": applied[2].min(axis=0)}
        | {"published, loss finite until": "the end" if finite.all() else int(finite.argmin())}
        | {f"loss / first, {name}": loss[-1] for name, loss in zip(names, losses, strict=True)}
    )


Panel(
    "explorer-d",
    show_gradnorm,
    norm_1=log_slider("norm of RUL", 2.4),
    norm_2=log_slider("norm of health", -0.3),
    progress_1=float_slider("progress of RUL", 0.8, 0.05, 1.5, 0.05),
    progress_2=float_slider("progress of health", 0.4, 0.05, 1.5, 0.05),
    alpha=float_slider("alpha", 1.5, 0, 3, 0.1, digits=1),
    step=log_slider("published step", np.log10(0.05), low=-3, high=1),
    optimizer=choice("model trained by", list(OPTIMIZERS), "Adam 0.03"),
)

# %% [markdown]
# ## e. The closed loop
#
# **What it teaches:** GABA is a feedback loop, and `beta` says how fast it answers.
#
# The rule is proportional control of the shares: the set point is 1/K each, the gain $1/(K-1)$
# the largest that keeps every weight positive. The average is a low-pass filter, the floor a
# saturation. Set the norms by the sliders, or their ratio by a button; 500x and 2,400x are what a
# regression and a classifier on turbofan data have shown. Below the loop is its response from the
# first update on, as the weights that it applies.


# %% tags=["hide-input"]
@partial(jax.jit, static_argnames="steps")
def simulated(norms, beta, min_weight, steps):
    rule = weighting.gaba(2, beta=beta, warmup_steps=100, min_weight=min_weight)
    return controller.simulate(norms, rule, steps=steps)


def signal(left, top, values):
    """A value a task, one under the other, in the colors of the tasks."""
    return "".join(
        f'<text x="{left}" y="{top + 17 * i}" fill="{color}" font-weight="bold">{value:.4g}</text>'
        for i, (value, color) in enumerate(zip(values, COLORS, strict=False))
    )


def block(left, top, title, formula, values, width=122):
    middle = left + width / 2
    return (
        f'<rect x="{left}" y="{top}" width="{width}" height="88" rx="6" fill="#f4f4f4" '
        f'stroke="#333"/><text x="{middle}" y="{top + 19}" font-weight="bold">{title}</text>'
        f'<text x="{middle}" y="{top + 37}" font-size="12">{formula}</text>'
        + signal(middle, top + 58, values)
    )


def arrow(*points):
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="#333" marker-end="url(#tip)"/>'


def response(loop, wanted, update):
    """The weights over the updates, the controller's (dotted), and a line at this update."""
    figure = Figure(figsize=(8, 2.2), layout="constrained")
    axes, updates = figure.subplots(), np.arange(1, len(loop.weights) + 1)
    for i, (task, value) in enumerate(zip(TASKS, wanted, strict=True)):
        axes.plot(updates, loop.weights[:, i], color=COLORS[i], label=task)
        axes.axhline(value, color=COLORS[i], linestyle=":", linewidth=1)
    axes.axvline(update, color="0.35", linewidth=1)
    axes.set(xlim=(0, len(loop.weights)), xlabel="update (dotted: the controller's; upright: now)")
    axes.set(ylim=(-0.02, 1.02), ylabel="task weight")
    axes.legend(fontsize=9, frameon=False)
    return base64.b64encode(png(figure)).decode()


def show_loop(ratio, norm_1, norm_2, update, beta, min_weight):
    del ratio  # it has moved the norms
    norms = np.array([norm_1, norm_2])
    loop = simulated(jnp.asarray(norms), beta, min_weight, steps=600)
    wanted = controller.control(norms)
    after = max(update - 100, 0)  # updates of the average since the warm-up
    average = controller.step_response(after, start=0.5, target=wanted, beta=beta)
    applied, shares = loop.weights[update - 1], controller.share(norms)
    tasks = "".join(
        f'<tspan fill="{color}" font-weight="bold">{task}</tspan> '
        for task, color in zip(TASKS, COLORS, strict=False)
    )
    picture = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 560" width="100%" role="img" '
        'font-family="sans-serif" font-size="14" text-anchor="middle" fill="#111">'
        "<title>The closed loop as a block diagram</title>"
        '<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z" fill="#333"/></marker></defs>'
        '<rect width="760" height="560" fill="white"/>'
        f'<text x="12" y="24" text-anchor="start">update {update}: {tasks}</text>',
        '<text x="34" y="84" font-size="12">set point</text><text x="34" y="102">1/K</text>',
        arrow((56, 98), (83, 98)),
        '<circle cx="96" cy="98" r="12" fill="white" stroke="#333"/><text x="96" y="103">+</text>',
        '<text x="84" y="128" font-size="16">−</text>',
        '<text x="122" y="48" font-size="12">error</text>',
        signal(122, 64, controller.error(norms)),
        arrow((108, 98), (153, 98)),
        block(154, 54, "gain", f"1/K + {controller.gain(2):g} · error", wanted),
        arrow((276, 98), (299, 98)),
        block(300, 54, "average", f"β = {beta:g}, t = {after}", average),
        arrow((422, 98), (445, 98)),
        block(446, 54, "floor", f"lift to {min_weight:g}, / sum", applied),
        arrow((568, 98), (621, 98)),
        '<text x="594" y="88" font-size="12">weights</text>',
        block(622, 54, "model", "norms", norms),
        arrow((683, 142), (683, 226), (569, 226)),
        block(446, 182, "share", "of sum of norms", shares),
        arrow((446, 226), (96, 226), (96, 111)),
        '<text x="271" y="216" font-size="12">measured shares</text>',
        '<text x="676" y="262" font-size="12">contributions</text>',
        signal(676, 279, loop.contributions[update - 1]),
        '<image x="0" y="308" width="760" height="209" '
        f'href="data:image/png;base64,{response(loop, wanted, update)}"/>',
        '<g transform="translate(0 518)"><!-- settings --></g>',
        "</svg>",
    ]
    return "".join(picture), {
        "task": TASKS,
        "share": shares,
        "error": controller.error(norms),
        "weight, controller": wanted,
        "weight, average": average,
        "weight, applied": applied,
        "contribution": loop.contributions[update - 1],
        "updates to settle (2 %)": 100 + controller.settling_steps(beta),
    }


RATIOS = {f"{ratio:,}x": float(ratio) for ratio in (1, 50, 500, 1000, 2400)}
ratio = choice("RUL / health", RATIOS, 500.0)
norm_1, norm_2 = log_slider("norm of RUL", np.log10(500), high=4), log_slider("norm of health", 0)


def set_norms(change):
    if change.new is not None and change.new != norm_1.value / norm_2.value:
        norm_2.value, norm_1.value = 1.0, change.new


def unset_ratio(_):
    now = norm_1.value / norm_2.value
    ratio.value = next((each for each in RATIOS.values() if np.isclose(each, now)), None)


ratio.observe(set_norms, names="value")
for norm in (norm_1, norm_2):
    norm.observe(unset_ratio, names="value")

Panel(
    "explorer-e",
    show_loop,
    ratio=ratio,
    norm_1=norm_1,
    norm_2=norm_2,
    update=int_slider("update", 300, 1, 600),
    beta=float_slider("beta", 0.99, 0, 0.995, 0.005, digits=3),
    min_weight=float_slider("floor", 0.05, 0, 0.5, 0.01),
)

# %% [markdown]
# ## f. Floors, and more than two tasks
#
# **What it teaches:** a floor keeps every task in play and costs balance, and with more than two
# tasks the closed form itself leaves contributions unequal.
#
# "renormalize", as published, lifts to the floor and divides by the sum, which takes the
# smallest below it again: the dashed line is how far. "project" holds the floor. For more than
# two tasks a weight is at most $1/(K-1)$.


# %% tags=["hide-input"]
@jax.jit
def floored(weights, min_weight):
    kinds = ("renormalize", "project")
    return [controller.saturation(weights, min_weight=min_weight, floor=kind) for kind in kinds]


def show_floors(num_tasks, min_weight, ratio, spread):
    norms = np.geomspace(ratio, 1, num_tasks) if spread == "graded" else np.ones(num_tasks)
    norms[0] = ratio
    closed = controller.control(norms)
    weights = np.stack([closed, *floored(jnp.asarray(closed), min_weight)])
    names = ("closed form", "renormalize", "project")
    bound = min_weight / (1 + (num_tasks - 1) * min_weight)
    figure, (left, right) = canvas("weights", "contributions")
    tasks = [str(task) for task in range(1, num_tasks + 1)]
    for axes, values in ((left, weights), (right, weights * norms)):
        bars(axes, tasks, dict(zip(names, values, strict=True)))
        axes.set_xlabel("task", fontsize=9)
        legend(axes)
    left.margins(y=0.15)
    left.axhline(min_weight, color=COLORS[6], linewidth=1)
    left.axhline(bound, color=COLORS[6], linewidth=1, linestyle="--")
    log_axis(right, weights * norms)
    of_kinds = monitor.task_metrics(weights, norms)
    return figure, (
        {"task": tasks, "norm": norms}
        | {f"weight, {name}": each for name, each in zip(names, weights, strict=True)}
        | {f"least weight, {name}": each.min() for name, each in zip(names, weights, strict=True)}
        | {"true bound of renormalize": bound}
        | {
            f"largest / smallest contribution, {name}": each
            for name, each in zip(names, of_kinds["imbalance"], strict=True)
        }
    )


Panel(
    "explorer-f",
    show_floors,
    num_tasks=int_slider("tasks, K", 4, 2, 10),
    min_weight=float_slider("floor", 0.05, 0, 0.1, 0.005, digits=3),
    ratio=log_slider("largest norm", 2.7, low=0, high=3.5),
    spread=choice("other norms", ["all 1", "graded"], "graded"),
)

# %% [markdown]
# What the text above says, held to account.

# %%
norms, progress = jnp.array([250.0, 0.5]), jnp.array([0.8, 0.4])
closed, averaged = closed_form_and_200_steps(norms, 0.99, 100, 0.05, debias=False)
assert np.isclose(*closed.contributions[0])
assert averaged.weights[-1, 0] > closed.weights[0, 0]  # not there yet
uniform, root, _ = (answer.contributions[0] for answer in three_rules(norms))
assert np.isclose(root[0] / root[1], (uniform[0] / uniform[1]) ** 0.5)
yours = own_weight(norms, controller.control(norms)[0]).contributions[0]
assert np.isclose(*yours, rtol=1e-4)
total = squares[0][found].sum(axis=0)
assert np.allclose(measured(None).task_norms, np.sqrt(total))
assert found.tolist() == [leaf.startswith("backbone") for leaf in leaves]
for at_alpha_0_or_equal in ((progress, 0.0), (progress[:1] * jnp.ones(2), 1.5)):
    by_gaba, balance_point, _ = learned_and_closed(norms, *at_alpha_0_or_equal)
    assert np.allclose(by_gaba, balance_point)
losses, applied, _ = trained(norms, progress, 1.5, 0.5, "SGD 0.02")
assert applied[2, 1, 0] < 0
assert np.isfinite(losses).all(axis=(1, 2)).tolist() == [True, True, False]
assert losses[0, -1, 0] > 0.9  # slow
losses, applied, pulls = trained(norms, progress, 1.5, 0.05, "Adam 0.03")
contributions = applied * pulls
assert np.allclose(contributions[0, :, 0], contributions[0, :, 1], rtol=1e-3)
assert (contributions[1, :, 0] > contributions[1, :, 1]).all()  # RUL lags behind
assert losses[0, -1, 0] < 0.8
assert losses[0, -1, 1] < 0.05
renormalized, projected = floored(jnp.array([0.002, 0.998]), 0.05)
assert renormalized[0] < 0.05
assert np.isclose(projected[0], 0.05)
