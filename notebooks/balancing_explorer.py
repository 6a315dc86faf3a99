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
# documentation, the pictures show the values that the controls start with.

# %%
try:
    import gaba_jax
except ModuleNotFoundError:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", "install -q gaba_jax ipywidgets matplotlib")
    import gaba_jax

# %%
import base64
import html
import io
from functools import cache, partial

import ipywidgets as widgets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

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
        self.show, self.controls, self.alt = show, controls, f"picture of {css_class}"
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

    def refresh(self, _=None):
        try:
            self.image, numbers = self.show(**{name: c.value for name, c in self.controls.items()})
        except ValueError as error:  # what the library has against these values
            self.picture.value = ""
            self.numbers.value = f'<p class="refused">{html.escape(str(error))}</p>'
            return
        drawn = self.image
        if isinstance(drawn, bytes):
            source = f"data:image/png;base64,{self.encoded()}"
            drawn = f'<img alt="{self.alt}" style="width:100%" src="{source}">'
        self.picture.value = f'<div style="min-width:560px">{drawn}</div>'
        self.numbers.value = table(numbers)

    def encoded(self):
        return base64.b64encode(self.image).decode()

    def _repr_mimebundle_(self, **_):
        svg = isinstance(self.image, str)
        still = {"image/svg+xml": self.image} if svg else {"image/png": self.encoded()}
        return self.box._repr_mimebundle_() | still | {"text/plain": self.alt}


def log_slider(name, exponent, low=-2, high=3):
    """Starts at 10**exponent, goes from 10**low to 10**high, ten steps to a factor of ten."""
    return widgets.FloatLogSlider(
        10**exponent, min=low, max=high, step=0.1, description=name, readout_format=".6g"
    )


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


def canvas(*titles, width_ratios=None):
    """A figure with one plain axes a title."""
    figure = Figure(figsize=(8, 3))  # with fixed margins: a layout engine doubles the time
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.16, top=0.78, wspace=0.3)
    every = figure.subplots(1, len(titles), width_ratios=width_ratios, squeeze=False)[0]
    for axes, title in zip(every, titles, strict=True):
        axes.set_title(title, fontsize=10, loc="left", y=1.1)  # a given y spares the search for one
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, every


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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


# %% [markdown]
# ## a. Two gradient norms
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
    return png(figure), {
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
# With two tasks one weight $\lambda$ says all: the first contributes $\lambda g_1$, the second
# $(1 - \lambda) g_2$. The closed form is where they cross. Uniform weights leave the norms as
# far apart as they are, the square root halves the distance on the log axis.


# %% tags=["hide-input"]
RULES = {
    "uniform": weighting.uniform(2),
    "square root": weighting.inverse_norm(2, power=0.5),
    "GABA": weighting.inverse_share(2),
}


@jax.jit
def three_rules(norms):
    return [controller.simulate(norms, rule, steps=1) for rule in RULES.values()]


def show_crossing(norm_1, norm_2):
    answers = three_rules(jnp.array([norm_1, norm_2]))
    figure, (left, right) = canvas(
        "contributions by the weight of RUL, λ", "contributions of the rules", width_ratios=(1, 1.2)
    )
    exponents = np.linspace(-12, 12, 400)
    weight = 1 / (1 + np.exp(-exponents))
    left.plot(weight, weight * norm_1, color=COLORS[0], label="λ g₁")
    left.plot(weight, (1 - weight) * norm_2, color=COLORS[1], label="(1 − λ) g₂")
    for marker, answer in zip("os^", answers, strict=True):
        at, of_each = answer.weights[0, 0], answer.contributions[0]
        left.plot([at, at], of_each, marker, color=COLORS[6], markersize=6, linestyle=":")
    left.set(xscale="logit", xlim=(1e-5, 1 - 1e-5))
    log_axis(left, [norm_1, norm_2, norm_1 / 1e4, norm_2 / 1e4])
    left.minorticks_off()
    left.tick_params(axis="x", labelsize=8)
    legend(left)
    of_rules = np.stack([answer.contributions[0] for answer in answers])
    places = [f"{mark} {name}" for mark, name in zip("●■▲", RULES, strict=True)]
    bars(right, places, dict(zip(TASKS, of_rules.T, strict=True)))
    log_axis(right, of_rules)
    legend(right)
    numbers = {"task": TASKS, "norm": (norm_1, norm_2)}
    for name, answer in zip(RULES, answers, strict=True):
        numbers[f"weight, {name}"] = answer.weights[0]
        numbers[f"contribution, {name}"] = answer.contributions[0]
    return png(figure), numbers


Panel(
    "explorer-b",
    show_crossing,
    norm_1=log_slider("norm of RUL", 1.5),
    norm_2=log_slider("norm of health", -0.3),
)

# %% [markdown]
# ## c. Which parameters count
#
# The norms are taken on what the tasks share. `gaba()` finds that from the gradients: a leaf on
# which two tasks have a gradient. Here the ticks are handed over as `shared=`. Count a head, and
# the norm of its own task grows, though no other task pulls there.


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
first_losses, first_grads = task_value_and_grad(losses_fn)(params, *batch)
leaves = [
    jax.tree_util.keystr(path, simple=True, separator=".")
    for path, _ in jax.tree.leaves_with_path(params)
]


@cache
def measured(ticks):
    """The state after one update of the closed form; None: shared leaves found from gradients."""
    mask = ticks and jax.tree.unflatten(jax.tree.structure(params), ticks)
    tx = balance(weighting.inverse_share(2), shared=mask)
    return jax.jit(lambda grads: tx.update(grads, tx.init(params), params)[1])(first_grads)


found = np.asarray(measured(None).seen_by_task).all(axis=1)
alone = [measured(tuple(leaf == other for other in leaves)).task_norms for leaf in leaves]


def show_leaves(**ticks):
    metrics = balance_metrics(measured(tuple(ticks.values())), TASKS)
    per_task = {
        key: [metrics[f"{key}/{task}"] for task in TASKS]
        for key in ("norm", "weight", "contribution")
    }
    figure, (left, middle, right) = canvas(
        "norm on each leaf", "norm where ticked", "weight", width_ratios=(1.5, 1, 1)
    )
    figure.subplots_adjust(left=0.2)
    for place, (leaf, norms) in enumerate(zip(leaves, np.stack(alone), strict=True)):
        for i, norm in enumerate(norms):
            ink = {"color": COLORS[i], "alpha": 1 if ticks[leaf] else 0.25}
            left.barh(place + 0.2 - 0.4 * i, norm, 0.36, **ink)
    left.set_yticks(range(len(leaves)), leaves)
    left.set(xscale="log", xlim=(1e-3, None))
    left.minorticks_off()
    left.grid(visible=False, axis="y")
    for axes, key in ((middle, "norm"), (right, "weight")):
        for i, value in enumerate(per_task[key]):
            axes.bar_label(axes.bar(i, value, color=COLORS[i]), fmt="{:.3g}", fontsize=9)
        axes.set_xticks([0, 1], TASKS)
    middle.set(yscale="log", ylim=(1e-3, 1e4))
    middle.minorticks_off()
    right.set_ylim(0, 1.1)
    of_leaves = {f"norm, {leaf}": norms for leaf, norms in zip(leaves, alone, strict=True)}
    return png(figure), {"task": TASKS} | per_task | of_leaves


Panel(
    "explorer-c",
    show_leaves,
    **{
        leaf: widgets.Checkbox(value=bool(shared), description=leaf, indent=False)
        for leaf, shared in zip(leaves, found, strict=True)
    },
)

# %% [markdown]
# ## d. GABA against GradNorm
#
# GradNorm learns weights that pull harder on the task whose loss, relative to where it began,
# lags behind; `alpha` says how much harder. At `alpha` = 0, or at equal progress, its balance
# point is GABA's closed form. *Left:* that point, and what GradNorm (Adam, 0.025) has learned
# after 200 updates of constant norms. *Right:* the model of panel c with its losses scaled to
# these norms, trained for 100 updates. The published variant takes a plain SGD step on its
# weights, of 0.05 in the paper, and guards nothing: a step that makes a weight negative climbs
# that loss, the gradient grows, and the next step is larger still.
#
# The model itself is trained by SGD, whose steps are as small as the weighted gradients, or by
# Adam, which has its own scale: there GABA is not slow, and the published variant fails by not
# learning.


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


OPTIMIZERS = {"SGD 0.02": optax.sgd(0.02), "Adam 0.1": optax.adam(0.1)}
first_norms = measured(None).task_norms


@partial(jax.jit, static_argnames="optimizer")
def trained(norms, progress, alpha, step, optimizer):
    """Of three trainings: losses over the first ones [3, T, 2], and weights [3, T, 2]."""
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
            weights = optax.tree.get(opt_state, "task_weights")
            return (optax.apply_updates(params, updates), opt_state), (losses, weights)

        losses, weights = jax.lax.scan(update, (params, tx.init(params)), length=100)[1]
        return losses / losses[0], weights

    by_gaba = gaba(beta=0.0, warmup_steps=0, min_weight=0.0)
    runs = [run(each) for each in (by_gaba, gradnorm(**start), gradnorm(**start, **brave))]
    return tuple(map(jnp.stack, zip(*runs, strict=True)))


def show_gradnorm(norm_1, norm_2, progress_1, progress_2, alpha, step, optimizer):
    norms, progress = jnp.array([norm_1, norm_2]), jnp.array([progress_1, progress_2])
    weights = np.asarray(learned_and_closed(norms, progress, alpha))
    losses, applied = map(np.asarray, trained(norms, progress, alpha, step, optimizer))
    figure, (left, middle, right) = canvas(
        "contributions, constant norms",
        "weights, published",
        "RUL loss / its first",
        width_ratios=(1, 0.85, 1.2),
    )
    figure.subplots_adjust(wspace=0.25)
    places = ["GABA", "balance\npoint", "GradNorm"]
    bars(left, places, dict(zip(TASKS, (weights * norms).T, strict=True)))
    log_axis(left, weights * norms)
    updates = np.arange(1, 101)
    for i, task in enumerate(TASKS):
        middle.plot(updates, applied[2, :, i], color=COLORS[i], label=task)
    middle.set_yscale("symlog", linthresh=1)
    middle.set_yticks([-1e3, -1e1, 0, 1e1, 1e3])
    middle.set_ylim(-1e4, 1e4)
    names, lines = ("GABA", "GradNorm", "published"), ("-", "--", "-")
    for name, loss, color, line in zip(names, losses, COLORS[2:], lines, strict=False):
        right.plot(updates, loss[:, 0], color=color, label=name, linestyle=line)
    right.set(yscale="log", ylim=(1e-3, 1e3))
    right.minorticks_off()
    for axes in (left, middle, right):
        legend(axes)
    for axes in (middle, right):
        axes.set_xlabel("update", fontsize=9)
    finite = np.isfinite(losses[2]).all(axis=1)
    if not finite.all():
        middle.set_xlim(0, 2 * finite.argmin())
    return png(figure), (
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
    step=log_slider("published step", -0.3, low=-3, high=1),
    optimizer=choice("model trained by", list(OPTIMIZERS), "SGD 0.02"),
)

# %% [markdown]
# ## e. The closed loop
#
# The rule is proportional control of the shares: the set point is 1/K each, the gain $1/(K-1)$
# the largest that keeps every weight positive. The average is a low-pass filter, the floor a
# saturation. Presets are the ratios of two tasks' norms; 500 and 2400 are what a regression and
# a classifier on turbofan data have shown.


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
        f'<text x="{middle}" y="{top + 37}" font-size="13">{formula}</text>'
        + signal(middle, top + 58, values)
    )


def arrow(*points):
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="#333" marker-end="url(#tip)"/>'


def show_loop(ratio, update, beta, min_weight):
    norms = np.array([ratio, 1.0])
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
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300" width="100%" role="img" '
        'font-family="sans-serif" font-size="14" text-anchor="middle" fill="#111">'
        "<title>The closed loop as a block diagram</title>"
        '<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z" fill="#333"/></marker></defs>'
        '<rect width="760" height="300" fill="white"/>'
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
        block(446, 54, "floor", f"max with {min_weight:g}, / sum", applied),
        arrow((568, 98), (621, 98)),
        '<text x="594" y="88" font-size="12">weights</text>',
        block(622, 54, "model", "norms", norms),
        arrow((683, 142), (683, 226), (569, 226)),
        block(446, 182, "share", "of the sum of norms", shares),
        arrow((446, 226), (96, 226), (96, 111)),
        '<text x="271" y="216" font-size="12">measured shares</text>',
        '<text x="676" y="262" font-size="12">contributions</text>',
        signal(676, 279, loop.contributions[update - 1]),
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


Panel(
    "explorer-e",
    show_loop,
    ratio=choice("norms", {"equal": 1.0, "10x": 10.0, "500x": 500.0, "2400x": 2400.0}, 500.0),
    update=int_slider("update", 300, 1, 600),
    beta=float_slider("beta", 0.99, 0, 0.995, 0.005, digits=3),
    min_weight=float_slider("floor", 0.05, 0, 0.5, 0.01),
)

# %% [markdown]
# ## f. Floors, and more than two tasks
#
# "renormalize", as published, lifts to the floor and divides by the sum, which takes the
# smallest below it again: the dashed line is how far. "project" holds the floor. For more than
# two tasks a weight is at most $1/(K-1)$, so that the closed form leaves contributions unequal.


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
    return png(figure), (
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
assert found.tolist() == [leaf.startswith("backbone") for leaf in leaves]
for at_alpha_0_or_equal in ((progress, 0.0), (progress[:1] * jnp.ones(2), 1.5)):
    by_gaba, balance_point, _ = learned_and_closed(norms, *at_alpha_0_or_equal)
    assert np.allclose(by_gaba, balance_point)
losses, applied = trained(norms, progress, 1.5, 0.5, "SGD 0.02")
assert applied[2, 1, 0] < 0
assert np.isfinite(losses).all(axis=(1, 2)).tolist() == [True, True, False]
losses, _ = trained(norms, progress, 1.5, 0.5, "Adam 0.1")
assert losses[0, -1, 0] < 0.5 < 0.9 < losses[2, -1, 0]
renormalized, projected = floored(jnp.array([0.002, 0.998]), 0.05)
assert renormalized[0] < 0.05
assert np.isclose(projected[0], 0.05)
