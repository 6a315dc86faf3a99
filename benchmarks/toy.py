"""Every rule on two small problems: ``python -m benchmarks.toy [--quick]``.

The two-parameter landscape of CAGrad (Liu et al., NeurIPS 2021), with the first loss times 0.1 as
in Nash-MTL (Navon et al., ICML 2022) and without; and two overlaid digits to be told apart, with
the second loss times 0.01 and without. Needs scikit-learn, of the extra ``test``, for its digits.
Prints tables and writes benchmarks/toy.json and docs/images/toy.png.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import _measure
from gaba_jax import balanced_value_and_grad, weighting
from gaba_jax.plot import COLORS
from gaba_jax.turbofan import compare, config

RESULT = Path(__file__).with_suffix(".json")
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "toy.png"

STARTS = np.float32([(-8.5, 7.5), (-8.5, 5.0), (0.0, 0.0), (9.0, 9.0), (10.0, -8.0)])
LANDSCAPE_SCALES = {"equal": (1.0, 1.0), "first x 0.1": (0.1, 1.0)}
LOWER_BOUND = -20.0  # of both losses: what is trained is the distance to it, which is positive
STEPS, KEPT = 40_000, 400  # updates, and how many of them the picture draws
ON_THE_FRONT = 0.1  # no point of the front is better by more in both losses, which span 20 there

SIDE, OFFSET = 12, 4  # of the canvas, and of the right digit on it
DIGIT_SCALES = {"equal": (1.0, 1.0), "right x 0.01": (1.0, 0.01)}
SEEDS, EPOCHS, BATCH_SIZE, WIDTH = (0, 1, 2), 40, 128, 64
LEARNING_RATES = {"landscape": 2.5e-3, "digits": 1e-3}  # of Adam


def methods() -> dict[str, weighting.Weighting]:
    """All that ``num_tasks`` makes, with the defaults, and two that wrap another."""
    made = {name: rule(2) for name, rule in config.rules().items()}
    made["normalized(upgrad)"] = weighting.normalized(weighting.upgrad(2))
    made["stabilize(mgda)"] = weighting.stabilize(weighting.mgda(2))
    return dict(sorted(made.items()))


def landscape(point: jax.Array) -> jax.Array:
    """The two losses [2] at a point [2]: valleys of logarithms above, two bowls below."""
    x, y = point
    upper, lower = jnp.maximum(jnp.tanh(y / 2), 0), jnp.maximum(jnp.tanh(-y / 2), 0)
    to_valleys = jnp.stack([(-x - 7) / 2 + jnp.tanh(y), (-x + 3) / 2 + jnp.tanh(y) + 2])
    valleys = jnp.log(jnp.maximum(jnp.abs(to_valleys), 5e-6)) + 6
    bowls = ((x - jnp.array([7.0, -7.0])) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20
    return upper * valleys + lower * bowls


def all_losses(points: Any) -> np.ndarray:
    """The losses [..., 2] at points [..., 2]."""
    flat = jnp.asarray(points, jnp.float32).reshape(-1, 2)
    return np.asarray(jax.jit(jax.vmap(landscape))(flat)).reshape(np.shape(points))


def front() -> tuple[np.ndarray, np.ndarray]:
    """The Pareto front: points [P, 2], where the gradients are opposed, and losses [P, 2].

    No other point is a part of it: neither valley goes below -6.2, where the other loss is above 0.
    """
    x = jnp.linspace(-7.0, 7.0, 1401)

    @jax.jit
    def cross(y: jax.Array) -> jax.Array:
        first, second = jnp.moveaxis(jax.vmap(jax.jacobian(landscape))(jnp.stack([x, y], 1)), 1, 0)
        return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]

    # Its sign is the one that it has at the low end until the front.
    low, high = jnp.full_like(x, -12.0), jnp.full_like(x, -6.0)
    sign = jnp.sign(cross(low))
    for _ in range(40):
        middle = (low + high) / 2
        below = cross(middle) * sign > 0
        low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
    points = jnp.stack([x, low], 1)
    return np.asarray(points), all_losses(points)


def above_front(losses: np.ndarray, front_losses: np.ndarray) -> np.ndarray:
    """By how much [...] some point of the front is better in both losses [..., 2]."""
    return (losses[..., None, :] - front_losses).min(axis=-1).max(axis=-1)


def descend(rule: weighting.Weighting, steps: int) -> np.ndarray:
    """Points [scales, starts, KEPT + 1, 2] on the way, the last where training ended."""
    adam = optax.adam(LEARNING_RATES["landscape"])

    def losses_fn(point: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * (landscape(point) - LOWER_BOUND)

    # Where one gradient is zero, the parameters are shared all the same.
    balanced = balanced_value_and_grad(losses_fn, rule, shared=True)

    def way(start: jax.Array, scale: jax.Array) -> jax.Array:
        def update(carry: Any, _: None) -> tuple[Any, None]:
            point, state, opt_state = carry
            (_, grads), state = balanced.value_and_grad(point, state, scale)
            updates, opt_state = adam.update(grads, opt_state, point)
            return (optax.apply_updates(point, updates), state, opt_state), None

        def some(carry: Any, _: None) -> tuple[Any, jax.Array]:
            carry, _ = jax.lax.scan(update, carry, length=max(steps // KEPT, 1))
            return carry, carry[0]

        carry = start, balanced.init(start), adam.init(start)
        _, points = jax.lax.scan(some, carry, length=KEPT)
        return jnp.concatenate([start[None], points])

    ways = jax.vmap(jax.vmap(way, in_axes=(0, None)), in_axes=(None, 0))
    scales = jnp.array(list(LANDSCAPE_SCALES.values()))
    return np.asarray(jax.jit(ways)(jnp.asarray(STARTS), scales))


class Overlays(NamedTuple):
    """Pairs of digits on one canvas each; ``sources`` says which digits of scikit-learn's."""

    images: np.ndarray  # [N, SIDE, SIDE], from 0 to 1
    labels: np.ndarray  # [N, 2], left and right
    sources: np.ndarray  # [N, 2]


def overlay_digits(partners: int = 4, test_share: float = 0.2) -> tuple[Overlays, Overlays]:
    """Training and test overlays, of digits that were split before they were paired."""
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    digits = np.float32(digits.reshape(-1, 8, 8) / 16)
    rng = np.random.default_rng(0)
    test, train = np.split(rng.permutation(len(digits)), [round(test_share * len(digits))])

    def overlay(rows: np.ndarray) -> Overlays:
        sources = np.stack(
            [
                np.tile(rows, partners),
                np.concatenate([rng.permutation(rows) for _ in range(partners)]),
            ],
            1,
        )
        left, right = np.zeros([2, len(sources), SIDE, SIDE], np.float32)
        left[:, :8, :8] = digits[sources[:, 0]]
        right[:, OFFSET:, OFFSET:] = digits[sources[:, 1]]
        return Overlays(np.maximum(left, right), np.int32(labels[sources]), sources)

    return overlay(train), overlay(test)


def init_params(key: jax.Array) -> dict[str, Any]:
    """Two shared layers and two linear heads."""
    sizes = {"first": (SIDE**2, WIDTH), "second": (WIDTH, WIDTH)}
    sizes |= {"left": (WIDTH, 10), "right": (WIDTH, 10)}
    return {
        name: {"kernel": jax.nn.initializers.he_normal()(k, size), "bias": jnp.zeros(size[1])}
        for k, (name, size) in zip(jax.random.split(key, len(sizes)), sizes.items(), strict=True)
    }


def logits(params: dict[str, Any], images: jax.Array) -> jax.Array:
    """[N, 2, 10] of images [N, SIDE, SIDE]."""

    def layer(name: str, x: jax.Array) -> jax.Array:
        return x @ params[name]["kernel"] + params[name]["bias"]

    features = images.reshape(len(images), -1)
    for name in ("first", "second"):
        features = jax.nn.relu(layer(name, features))
    return jnp.stack([layer("left", features), layer("right", features)], 1)


def classify(
    rule: weighting.Weighting, data: tuple[Overlays, Overlays], seeds: tuple[int, ...], epochs: int
) -> np.ndarray:
    """Test accuracies [scales, seeds, 2] of left and right after training."""
    adam = optax.adam(LEARNING_RATES["digits"])
    train, test = ((jnp.asarray(split.images), jnp.asarray(split.labels)) for split in data)
    size = len(train[0])
    per_epoch = size // BATCH_SIZE

    def losses_fn(params: Any, scale: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)
        return scale * loss.mean(axis=0)

    balanced = balanced_value_and_grad(losses_fn, rule)

    def run(seed: jax.Array, scale: jax.Array) -> jax.Array:
        def update(carry: Any, rows: jax.Array) -> tuple[Any, None]:
            params, state, opt_state = carry
            batch = train[0][rows], train[1][rows]
            (_, grads), state = balanced.value_and_grad(params, state, scale, *batch)
            updates, opt_state = adam.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), state, opt_state), None

        def epoch(carry: Any, key: jax.Array) -> tuple[Any, None]:
            rows = jax.random.permutation(key, size)[: per_epoch * BATCH_SIZE]
            return jax.lax.scan(update, carry, rows.reshape(per_epoch, BATCH_SIZE))

        params_key, batches_key = jax.random.split(jax.random.key(seed))
        params = init_params(params_key)
        carry = params, balanced.init(params), adam.init(params)
        (params, *_), _ = jax.lax.scan(epoch, carry, jax.random.split(batches_key, epochs))
        return (logits(params, test[0]).argmax(axis=-1) == test[1]).mean(axis=0)

    def runs(scale: jax.Array) -> jax.Array:
        return jax.lax.map(lambda seed: run(seed, scale), jnp.array(seeds))

    scales = jnp.array(list(DIGIT_SCALES.values()))
    return np.asarray(jax.jit(lambda: jax.lax.map(runs, scales))())


def summary(way: np.ndarray, accuracies: np.ndarray, front_losses: np.ndarray) -> dict[str, Any]:
    """What is written of one method."""
    ends = way[:, :, -1]
    losses = all_losses(ends)
    above = above_front(losses, front_losses)
    return {
        "landscape": {
            name: {
                "end": ends[i].tolist(),
                "losses": losses[i].tolist(),
                "above_front": above[i].tolist(),
                "on_front": (above[i] <= ON_THE_FRONT).tolist(),
            }
            for i, name in enumerate(LANDSCAPE_SCALES)
        },
        "digits": {name: accuracies[i].tolist() for i, name in enumerate(DIGIT_SCALES)},
    }


def tables(results: dict[str, Any]) -> tuple[str, str]:
    """The landscape and the digits, as Markdown, from ``results`` as they are in the JSON."""

    def interval(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return (
            f"{min(known):z.1f} to {max(known):z.1f}" if len(known) == len(values) else "not finite"
        )

    def spread(values: np.ndarray) -> str:
        return f"{100 * values.mean():.1f} ± {100 * values.std(ddof=min(1, len(values) - 1)):.1f}"

    landscapes, digits = [], []
    for result in results.values():
        cells = []
        for each in result["landscape"].values():
            cells.append(f"{sum(each['on_front'])} of {len(each['on_front'])}")
            cells += [interval(list(losses)) for losses in zip(*each["losses"], strict=True)]
        landscapes.append(cells)
        cells = []
        for runs in result["digits"].values():
            accuracies = np.array(runs)
            cells += map(spread, [*accuracies.T, accuracies.mean(axis=1)])
        digits.append(cells)
    return (
        _markdown(LANDSCAPE_SCALES, ["on the front", "$L_1$", "$L_2$"], results, landscapes),
        _markdown(DIGIT_SCALES, ["left", "right", "mean"], results, digits),
    )


def _markdown(scales: Any, columns: list[str], names: Any, rows: list[list[str]]) -> str:
    head = [f"{column}, {scale}" for scale in scales for column in columns]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    lines += [
        f"| `{name}` | " + " | ".join(cells) + " |" for name, cells in zip(names, rows, strict=True)
    ]
    return "\n".join(lines)


def draw(ways: dict[str, np.ndarray], scale: str) -> Figure:
    """A panel per method: its ways over the contours of the sum of the losses."""
    index, columns = list(LANDSCAPE_SCALES).index(scale), min(len(ways), 7)
    points, front_losses = front()
    x, y = np.linspace(-11.5, 11.5, 231), np.linspace(-11, 11, 221)
    total = all_losses(np.stack(np.meshgrid(x, y), -1)) @ np.array(LANDSCAPE_SCALES[scale])
    rows = -(-len(ways) // columns)
    figure = Figure(figsize=(max(2 * columns, 9), 2 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(ways) :]:
        axes.set_visible(False)
    for axes, (name, way) in zip(panels, ways.items(), strict=False):
        axes.contour(x, y, total, levels=18, colors="0.8", linewidths=0.5, linestyles="solid")
        axes.plot(*points.T, color=COLORS[6], linewidth=3, alpha=0.5, solid_capstyle="butt")
        reached = above_front(all_losses(way[index, :, -1]), front_losses) <= ON_THE_FRONT
        for path, color, there in zip(way[index], COLORS, reached, strict=False):
            axes.plot(*path.T, color=color, linewidth=1.4)
            axes.plot(*path[0], "o", color=color, markersize=4)
            end = "*" if there else "X"
            axes.plot(*path[-1], end, color=color, markersize=9, mec="black", mew=0.6, zorder=3)
        axes.set_title(f"{name}: {reached.sum()} of {len(reached)}", fontsize=8)
        axes.set(xlim=(-11.5, 11.5), ylim=(-11, 11), xticks=[], yticks=[])
    black = {"color": "black", "linestyle": "none"}
    figure.legend(
        handles=[
            Line2D([], [], marker="o", label="start", **black),
            Line2D([], [], marker="*", markersize=9, label="end, on the front", **black),
            Line2D([], [], marker="X", markersize=7, label="end, elsewhere", **black),
            Line2D([], [], color="black", linewidth=3, alpha=0.5, label="Pareto front"),
            Line2D([], [], color="0.8", label="sum of the losses"),
        ],
        loc="outside upper center",
        ncols=5,
        frameon=False,
    )
    return figure


def main(quick: bool = False, out: Path = RESULT, picture: Path = PICTURE) -> None:
    """Trains, draws and writes.

    Args:
      quick: two methods, a few updates: to see that it runs. Name another out and picture then.
      out: the JSON to write.
      picture: the PNG to write.
    """
    steps, epochs, seeds = (KEPT, 1, SEEDS[:2]) if quick else (STEPS, EPOCHS, SEEDS)
    data = overlay_digits()
    _, front_losses = front()
    ways: dict[str, np.ndarray] = {}
    results: dict[str, Any] = {}
    for name, rule in methods().items():
        if quick and name not in ("uniform", "gaba"):
            continue
        began = time.perf_counter()
        ways[name] = descend(rule, steps)
        accuracies = classify(rule, data, seeds, epochs)
        results[name] = summary(ways[name], accuracies, front_losses)
        seconds = time.perf_counter() - began
        reached = [sum(each["on_front"]) for each in results[name]["landscape"].values()]
        means = [round(float(each.mean()), 3) for each in accuracies]
        print(f"{name}: {seconds:.0f} s, on the front {reached}, accuracy {means}", flush=True)
    settings = {
        "learning_rates": LEARNING_RATES,
        "steps": steps,
        "starts": STARTS.tolist(),
        "epochs": epochs,
        "seeds": list(seeds),
        "overlays": [len(split.images) for split in data],
    }
    result = compare.finite({"settings": settings, "results": results})
    _measure.write(out, result, packages=("scikit-learn",))
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(ways, "first x 0.1").savefig(picture, dpi=110)
    print("\n\n".join(tables(result["results"])))


if __name__ == "__main__":
    tyro.cli(main)
