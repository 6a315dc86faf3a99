"""The problems of the study: a small model each, its losses, and metrics on held-out data."""

import functools
import gzip
import itertools
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

from benchmarks import toy
from gaba_jax.turbofan import data as turbofan
from gaba_jax.turbofan.losses import cross_entropy, mean_squared_error
from gaba_jax.turbofan.model import CompactModel

Params = Any
Losses = tuple[jax.Array, ...] | jax.Array


class Problem(NamedTuple):
    """What is trained, and how it is judged.

    Attributes:
      field: what the problem comes from.
      tasks: K names of losses.
      metrics: M names. Where M is K, metric i is that of task i alone; else no task makes sense by
        itself, and scores are relative to uniform weights.
      higher_is_better: of each metric.
      init: key -> parameters.
      losses: (parameters, key of the batch) -> K positive scalars, in a tuple or an array [K].
      evaluate: (parameters, 0 for validation or 1 for test) -> [M].
      steps: of one training run.
      learning_rate: the middle one of those tried.
      variances: [K] of the targets in the losses' units, of regressions alone.
    """

    field: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    higher_is_better: tuple[bool, ...]
    init: Callable[[jax.Array], Params]
    losses: Callable[[Params, jax.Array], Losses]
    evaluate: Callable[[Params, int], jax.Array]
    steps: int
    learning_rate: float = 3e-3
    variances: NDArray[np.float32] | None = None

    @property
    def has_single_tasks(self) -> bool:
        """Whether each task has a metric of its own."""
        return len(self.metrics) == len(self.tasks)


def dense(key: jax.Array, widths: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    """Kernels (LeCun normal) and zero biases."""
    start = jax.nn.initializers.lecun_normal()
    return [
        {"kernel": start(k, pair), "bias": jnp.zeros(pair[1])}
        for k, pair in zip(
            jax.random.split(key, len(widths) - 1), itertools.pairwise(widths), strict=True
        )
    ]


def apply(
    layers: list[dict[str, jax.Array]], x: jax.Array, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Dense layers, the last one linear."""
    *hidden, last = layers
    for layer in hidden:
        x = activation(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


# Engines: remaining useful life (cycles squared) and health state (nats).


def engines(subset: str, shared: Path) -> Problem:
    """C-MAPSS with the compact model; all windows of the test engines are scored."""
    fleet = turbofan.load(shared / "cmapss", subset)
    assert fleet.test_all is not None  # there are more windows than the last of each engine
    train, splits = jax.device_put(fleet.train), (fleet.validation, fleet.test_all)
    window, channels = fleet.train.windows.shape[1:]
    graph = nnx.graphdef(nnx.eval_shape(lambda: CompactModel(window, channels, rngs=nnx.Rngs(0))))

    def init(key: jax.Array) -> Params:
        return nnx.state(CompactModel(window, channels, rngs=nnx.Rngs(key)), nnx.Param)

    def losses(params: Params, key: jax.Array) -> Losses:
        rows = jax.random.randint(key, [128], 0, len(train.rul))
        rul, logits = nnx.merge(graph, params)(train.windows[rows])
        return mean_squared_error(rul, train.rul[rows]), cross_entropy(logits, train.health[rows])

    def evaluate(params: Params, split: int) -> jax.Array:
        held_out = splits[split]
        rul, logits = nnx.merge(graph, params)(jnp.asarray(held_out.windows))
        error = jnp.sqrt(jnp.mean((rul - held_out.rul) ** 2))
        return jnp.stack([error, jnp.mean(jnp.argmax(logits, 1) == held_out.health)])

    return Problem(
        field="engines",
        tasks=("rul", "health"),
        metrics=("RMSE", "accuracy"),
        higher_is_better=(False, True),
        init=init,
        losses=losses,
        evaluate=evaluate,
        steps=400,
    )


# Tables: squared errors in the units of the targets.


class Table(NamedTuple):
    inputs: NDArray[np.float32]  # [N, inputs]
    targets: NDArray[np.float32]  # [N, K]
    names: tuple[str, ...]
    groups: NDArray[np.int64]  # [N]; rows of one group stay in one split


def arff(path: Path, num_targets: int) -> Table:
    """The last columns of an ARFF file are its targets; missing values are the column's mean."""
    with gzip.open(path, "rt") as file:
        lines = [line.strip() for line in file]
    lines = [line for line in lines if line and not line.startswith("%")]
    begin = next(i for i, line in enumerate(lines) if line.lower() == "@data")
    names = [line.split()[1] for line in lines[:begin] if line.lower().startswith("@attribute")]
    values = np.genfromtxt(lines[begin + 1 :], delimiter=",", missing_values="?")
    values = np.where(np.isnan(values), np.nanmean(values, axis=0), values)
    targets = np.asarray(values[:, -num_targets:], np.float32)
    return Table(
        np.asarray(values[:, :-num_targets], np.float32),
        targets,
        tuple(names[-num_targets:]),
        np.arange(len(values)),
    )


def voices(path: Path) -> Table:
    """The two scores of Parkinson patients, by subject."""
    with gzip.open(path, "rt") as file:
        names = file.readline().rstrip("\n").split("\t")
        values = np.loadtxt(file, delimiter="\t")
    column = {name: values[:, i] for i, name in enumerate(names)}
    targets = ("motor_UPDRS", "total_UPDRS")
    inputs = [v for name, v in column.items() if name not in (*targets, "subject#")]
    return Table(
        np.stack(inputs, 1, dtype=np.float32),
        np.stack([column[name] for name in targets], 1, dtype=np.float32),
        targets,
        np.asarray(column["subject#"], np.int64),
    )


def regression(field: str, table: Table, steps: int) -> Problem:
    """Two shared layers of 64 and a linear head per target, in batches of 64.

    60 % of the groups are for training, 20 % each for validation and test. Inputs are standardised.
    Each head predicts its target standardised; the loss is the squared error in the target's units.
    """
    groups = np.random.default_rng(0).permutation(np.unique(table.groups))
    cuts = np.split(groups, [round(0.6 * len(groups)), round(0.8 * len(groups))])
    train, *held_out = (np.flatnonzero(np.isin(table.groups, cut)) for cut in cuts)
    center, spread = table.inputs[train].mean(0), table.inputs[train].std(0)
    inputs = (table.inputs - center) / np.where(spread > 0, spread, 1)
    center, spread = table.targets[train].mean(0), table.targets[train].std(0)
    targets = (table.targets - center) / spread
    x, y = jnp.asarray(inputs[train]), jnp.asarray(targets[train])

    def init(key: jax.Array) -> Params:
        hidden, heads = jax.random.split(key)
        return {
            "hidden": dense(hidden, (x.shape[1], 64, 64)),
            "heads": [dense(k, (64, 1))[0] for k in jax.random.split(heads, y.shape[1])],
        }

    def predict(params: Params, x: jax.Array) -> jax.Array:
        features = nnx.relu(apply(params["hidden"], x, nnx.relu))
        return jnp.stack([apply([head], features, nnx.relu)[:, 0] for head in params["heads"]], 1)

    def losses(params: Params, key: jax.Array) -> Losses:
        rows = jax.random.randint(key, [64], 0, len(x))
        return spread**2 * jnp.mean((predict(params, x[rows]) - y[rows]) ** 2, axis=0)

    def evaluate(params: Params, split: int) -> jax.Array:
        rows = held_out[split]
        predicted = predict(params, jnp.asarray(inputs[rows]))
        return spread * jnp.sqrt(jnp.mean((predicted - targets[rows]) ** 2, axis=0))

    return Problem(
        field=field,
        tasks=table.names,
        metrics=tuple(f"RMSE of {name}" for name in table.names),
        higher_is_better=(False,) * len(table.names),
        init=init,
        losses=losses,
        evaluate=evaluate,
        steps=steps,
        learning_rate=1e-2,
        variances=spread**2,
    )


# Images: two overlaid digits.


def digits(scale: float) -> Problem:
    """Which digit is left, which is right; the loss of the right one times ``scale``."""
    known, test = toy.overlay_digits()
    # Overlays of the same digits stay in one split.
    order = np.random.default_rng(0).permutation(np.unique(known.sources[:, 0]))
    for_validation = np.isin(known.sources, order[: len(order) // 5]).any(axis=1)
    train = [jnp.asarray(a[~for_validation]) for a in (known.images, known.labels)]
    inside = np.isin(known.sources, order[: len(order) // 5]).all(axis=1)
    splits = [(known.images[inside], known.labels[inside]), (test.images, test.labels)]

    def losses(params: Params, key: jax.Array) -> Losses:
        rows = jax.random.randint(key, [128], 0, len(train[0]))
        found = toy.logits(params, train[0][rows])
        loss = optax.softmax_cross_entropy_with_integer_labels(found, train[1][rows])
        return jnp.array([1.0, scale]) * loss.mean(axis=0)

    def evaluate(params: Params, split: int) -> jax.Array:
        images, labels = splits[split]
        return jnp.mean(jnp.argmax(toy.logits(params, jnp.asarray(images)), 2) == labels, axis=0)

    return Problem(
        field="images",
        tasks=("left", "right"),
        metrics=("accuracy, left", "accuracy, right"),
        higher_is_better=(True, True),
        init=toy.init_params,
        losses=losses,
        evaluate=evaluate,
        steps=1500,
    )


# Physics: networks that are to solve an equation, of tanh layers of 32.


def solution(params: Params, *point: jax.Array) -> jax.Array:
    """u [] at one point."""
    return apply(params, jnp.stack(point), jnp.tanh)[0]


def relative_error(predicted: jax.Array, exact: jax.Array) -> jax.Array:
    """L2, as a metric [1]."""
    return jnp.linalg.norm(predicted - exact)[None] / jnp.linalg.norm(exact)


def physics(
    tasks: tuple[str, ...],
    widths: tuple[int, ...],
    losses: Callable[[Params, jax.Array], Losses],
    evaluate: Callable[[Params, int], jax.Array],
    steps: int,
) -> Problem:
    """What the equations below share."""
    return Problem(
        field="physics",
        tasks=tasks,
        metrics=("relative L2 error",),
        higher_is_better=(False,),
        init=functools.partial(dense, widths=widths),
        losses=losses,
        evaluate=evaluate,
        steps=steps,
        learning_rate=1e-2,
    )


def ode() -> Problem:
    """u' = -3u on [0, 2] with u(0) = 1: the initial condition is a single point."""
    points = jnp.linspace(0.0, 2.0, 64)
    judged = (jnp.linspace(0.01, 1.99, 50), jnp.linspace(0.0, 2.0, 201))

    def losses(params: Params, key: jax.Array) -> Losses:
        del key  # all points at each step

        def residual(t: jax.Array) -> jax.Array:
            u, slope = jax.value_and_grad(lambda t: solution(params, t))(t)
            return slope + 3 * u

        start = solution(params, jnp.float32(0.0)) - 1
        return jnp.mean(jax.vmap(residual)(points) ** 2), start**2

    def evaluate(params: Params, split: int) -> jax.Array:
        t = judged[split]
        return relative_error(jax.vmap(lambda t: solution(params, t))(t), jnp.exp(-3 * t))

    return physics(("residual", "initial value"), (1, 32, 32, 1), losses, evaluate, 3000)


def second_derivative(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[jax.Array, ...]:
    """f, f' and f'' at x."""

    def with_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(f, (x,), (jnp.ones_like(x),))

    (value, slope), (_, curvature) = jax.jvp(with_slope, (x,), (jnp.ones_like(x),))
    return value, slope, curvature


NU = 0.01 / np.pi  # of Burgers' equation
DIFFUSION, GRID = 1e-4, 256  # of Allen and Cahn's, and its points in space


def burgers_solution(x: NDArray[Any], t: NDArray[Any]) -> NDArray[Any]:
    """Of u_t + u u_x = NU u_xx with u(x, 0) = -sin(pi x), for t > 0, by Cole and Hopf."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    eta = x[..., None] - np.sqrt(4 * NU * t)[..., None] * nodes
    exponent = -np.cos(np.pi * eta) / (2 * np.pi * NU)
    # Divided by the largest, so that nothing overflows.
    factor = weights * np.exp(exponent - exponent.max(axis=-1, keepdims=True))
    return -np.sum(np.sin(np.pi * eta) * factor, -1) / np.sum(factor, -1)


def allen_cahn_solution(substeps: int = 2000) -> tuple[NDArray[Any], NDArray[Any]]:
    """Places [GRID] and u [substeps + 1, GRID] from t = 0 to 1, by Strang splitting.

    Of u_t = DIFFUSION u_xx + 5 (u - u^3) with u(x, 0) = x^2 cos(pi x), periodic on [-1, 1].
    """
    x = np.linspace(-1, 1, GRID, endpoint=False)
    frequencies = np.pi * np.fft.fftfreq(GRID, 1 / GRID)
    decay = np.exp(-DIFFUSION * frequencies**2 / (2 * substeps))
    growth = np.exp(10 / substeps)
    u = [x**2 * np.cos(np.pi * x)]
    for _ in range(substeps):  # both parts are solved exactly
        half = np.fft.ifft(decay * np.fft.fft(u[-1])).real
        half = half * np.sqrt(growth / (1 + half**2 * (growth - 1)))
        u.append(np.fft.ifft(decay * np.fft.fft(half)).real)
    return x, np.array(u)


def burgers() -> Problem:
    """Burgers' equation on [-1, 1] x [0, 1]."""
    grids = [
        np.meshgrid(np.linspace(-0.99, 0.99, 60), np.linspace(0.05, 0.95, 16), indexing="ij"),
        np.meshgrid(np.linspace(-1, 1, 101), np.linspace(0.1, 1, 10), indexing="ij"),
    ]
    judged = [(x.ravel().astype(np.float32), t.ravel().astype(np.float32)) for x, t in grids]
    truths = [burgers_solution(x.ravel(), t.ravel()).astype(np.float32) for x, t in grids]

    def losses(params: Params, key: jax.Array) -> Losses:
        inner, first, border = jax.random.split(key, 3)

        def residual(x: jax.Array, t: jax.Array) -> jax.Array:
            u, u_x, u_xx = second_derivative(lambda x: solution(params, x, t), x)
            u_t = jax.jvp(lambda t: solution(params, x, t), (t,), (jnp.ones_like(t),))[1]
            return u_t + u * u_x - NU * u_xx

        x, t = jax.random.uniform(inner, [2, 128])
        x_0 = jax.random.uniform(first, [64], minval=-1)
        t_0 = jax.random.uniform(border, [32])
        at_start = jax.vmap(lambda x: solution(params, x, jnp.zeros_like(x)))(x_0)
        at_border = jax.vmap(lambda t: jnp.stack([solution(params, s + 0 * t, t) for s in (-1, 1)]))
        return (
            jnp.mean(jax.vmap(residual)(2 * x - 1, t) ** 2),
            jnp.mean((at_start + jnp.sin(jnp.pi * x_0)) ** 2),
            jnp.mean(at_border(t_0) ** 2),
        )

    def evaluate(params: Params, split: int) -> jax.Array:
        predicted = jax.vmap(lambda x, t: solution(params, x, t))(*map(jnp.asarray, judged[split]))
        return relative_error(predicted, jnp.asarray(truths[split]))

    tasks = ("residual", "initial", "boundary")
    return physics(tasks, (2, 32, 32, 32, 1), losses, evaluate, 1500)


def allen_cahn() -> Problem:
    """Allen and Cahn's equation on [-1, 1] x [0, 1].

    The inputs are cos and sin of pi x, so that the network is periodic by itself.
    """
    x_grid, every = allen_cahn_solution()
    table = every[:: len(every) // 20].astype(np.float32)  # [21, GRID], t = 0, .05, …
    # Times and places apart: validation in between those of the test.
    splits = [(table[1::2, 1::4], x_grid[1::4], 1), (table[::2, ::4], x_grid[::4], 0)]

    def u_of(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
        return solution(params, jnp.cos(jnp.pi * x), jnp.sin(jnp.pi * x), t)

    def losses(params: Params, key: jax.Array) -> Losses:
        inner, first = jax.random.split(key)

        def residual(x: jax.Array, t: jax.Array) -> jax.Array:
            u, _, u_xx = second_derivative(lambda x: u_of(params, x, t), x)
            u_t = jax.jvp(lambda t: u_of(params, x, t), (t,), (jnp.ones_like(t),))[1]
            return u_t - DIFFUSION * u_xx - 5 * (u - u**3)

        x, t = jax.random.uniform(inner, [2, 128])
        x_0 = jax.random.uniform(first, [64], minval=-1)
        at_start = jax.vmap(lambda x: u_of(params, x, jnp.zeros_like(x)))(x_0)
        return (
            jnp.mean(jax.vmap(residual)(2 * x - 1, t) ** 2),
            jnp.mean((at_start - x_0**2 * jnp.cos(jnp.pi * x_0)) ** 2),
        )

    def evaluate(params: Params, split: int) -> jax.Array:
        truth, x, first = splits[split]
        t = jnp.arange(first, 21, 2) / 20
        points = jnp.meshgrid(t, jnp.asarray(x, jnp.float32), indexing="ij")
        predicted = jax.vmap(jax.vmap(lambda t, x: u_of(params, x, t)))(*points)
        return relative_error(predicted, jnp.asarray(truth))

    return physics(("residual", "initial"), (3, 32, 32, 32, 1), losses, evaluate, 1500)


# Language: characters after eight others, by one of eight experts.


def language() -> Problem:
    """The manual that ships with Python; cross entropy, and .01 times the load-balancing loss."""
    context, width, experts, batch, scale = 8, 32, 8, 64, 0.01
    text = "".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    codes = jnp.asarray(np.clip(np.frombuffer(text.encode("ascii", "replace"), np.uint8), 10, 126))
    bounds = [0, int(0.8 * len(codes)), int(0.9 * len(codes)), len(codes)]

    def init(key: jax.Array) -> Params:
        embed, into, router, first, second, out = jax.random.split(key, 6)
        kernel = jax.nn.initializers.lecun_normal(batch_axis=0)
        return {
            "embed": jax.random.normal(embed, [127, 16]) / 4,
            "into": dense(into, (context * 16, width)),
            "router": dense(router, (width, experts)),
            "first": kernel(first, (experts, width, width)),
            "second": kernel(second, (experts, width, width)),
            "out": dense(out, (width, 127)),
        }

    def both(params: Params, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cross entropy and load-balancing loss (1 where experts are used alike), at positions."""
        before = codes[at[:, None] - jnp.arange(context, 0, -1)]
        x = nnx.relu(apply(params["into"], params["embed"][before].reshape(len(at), -1), nnx.relu))
        gates = nnx.softmax(apply(params["router"], x, nnx.relu))
        chosen = jax.nn.one_hot(jnp.argmax(gates, 1), experts)
        hidden = nnx.relu(jnp.einsum("nw,ewv->nev", x, params["first"]))
        # Every expert is computed; the gate of the chosen one alone lets through.
        x = x + jnp.einsum("nev,evw,ne->nw", hidden, params["second"], chosen * gates)
        logits = apply(params["out"], x, nnx.relu)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, codes[at])
        return jnp.mean(loss), experts * jnp.sum(jnp.mean(chosen, 0) * jnp.mean(gates, 0))

    def losses(params: Params, key: jax.Array) -> Losses:
        text_loss, load = both(params, jax.random.randint(key, [batch], context, bounds[1]))
        return text_loss, scale * load

    def evaluate(params: Params, split: int) -> jax.Array:
        at = jnp.linspace(bounds[split + 1] + context, bounds[split + 2] - 1, 4096).astype(int)
        return jnp.stack(both(params, at))

    return Problem(
        field="language",
        tasks=("text", "load"),
        metrics=("cross entropy", "load-balancing loss"),
        higher_is_better=(False, False),
        init=init,
        losses=losses,
        evaluate=evaluate,
        steps=1000,
        learning_rate=1e-2,
    )


def problems(shared: Path) -> dict[str, Callable[[], Problem]]:
    """All of them by name; ``shared`` holds ``cmapss`` and ``tabular``."""
    tables = shared / "tabular"
    return {
        "FD001": lambda: engines("FD001", shared),
        "FD003": lambda: engines("FD003", shared),
        "parkinsons": lambda: regression("medicine", voices(tables / "parkinsons.tsv.gz"), 150),
        "enb": lambda: regression("buildings", arff(tables / "enb.arff.gz", 2), 1500),
        "wq": lambda: regression("ecology", arff(tables / "wq.arff.gz", 14), 600),
        "oes10": lambda: regression("economics", arff(tables / "oes10.arff.gz", 16), 600),
        "digits": lambda: digits(1.0),
        "digits, right x 0.01": lambda: digits(0.01),
        "ODE": ode,
        "Burgers": burgers,
        "Allen-Cahn": allen_cahn,
        "language": language,
    }
