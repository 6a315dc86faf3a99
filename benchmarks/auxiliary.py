"""A main loss with auxiliaries, on a small language model: ``python -m benchmarks.auxiliary``.

Characters of the manual that ships with Python, after sixteen others, by one of eight experts. The
main loss is the cross entropy of the next character. The auxiliaries are the load-balancing loss of
the experts' gates, and the cross entropy of the character after the next (multi-token prediction).
Fixed constants against `equalize` with ratios and an anchor, with norms on all parameters or on the
gates alone. AdamW at one rate, three seeds. Prints a table and writes benchmarks/auxiliary.json.
"""

import functools
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import _measure
from benchmarks.evidence.problems import apply, dense
from gaba_jax import balanced_value_and_grad, only, weighting
from gaba_jax.weighting import Weighting

RESULT = Path(__file__).with_suffix(".json")
CONTEXT, WIDTH, EXPERTS, BATCH, STEPS = 16, 48, 8, 128, 2000
RATE = 3e-3
RATIOS = (1.0, 0.1, 0.3)  # of the contributions: main, load, second


class Method(NamedTuple):
    """A rule for (main, load, second), and where norms are taken."""

    rule: Callable[[], Weighting]
    measure_on: Any = None
    every: int = 1


def fixed(load: float, second: float) -> Method:
    return Method(lambda: weighting.constant(3, weights=jnp.array([1.0, load, second])))


def relative(measure_on: Any = None, every: int = 1) -> Method:
    rule = lambda: weighting.equalize(3, ratios=jnp.array(RATIOS), anchor=0)  # noqa: E731
    return Method(rule, measure_on, every)


METHODS: dict[str, Method] = {
    "main alone": fixed(0.0, 0.0),
    "constants .001, .3": fixed(0.001, 0.3),
    "constants .01, .3": fixed(0.01, 0.3),
    "constants .1, .3": fixed(0.1, 0.3),
    "constants 1, 1": fixed(1.0, 1.0),
    "equalize": relative(),
    "equalize, on the gates": relative(measure_on=only("gates")),
    "equalize, every=10": relative(every=10),
}


@functools.cache
def text() -> tuple[jax.Array, list[int]]:
    """Characters, and where training, validation and test begin and end."""
    topics = "".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    codes = np.frombuffer(topics.encode("ascii", "replace"), np.uint8)
    n = len(codes)
    return jnp.asarray(np.clip(codes, 10, 126)), [0, int(0.8 * n), int(0.9 * n), n]


def init(key: jax.Array) -> dict[str, Any]:
    keys = jax.random.split(key, 7)
    kernel = jax.nn.initializers.lecun_normal(batch_axis=0)
    return {
        "embed": jax.random.normal(keys[0], [127, 16]) / 4,
        "into": dense(keys[1], (CONTEXT * 16, WIDTH)),
        "gates": dense(keys[2], (WIDTH, EXPERTS)),
        "first": kernel(keys[3], (EXPERTS, WIDTH, WIDTH)),
        "second": kernel(keys[4], (EXPERTS, WIDTH, WIDTH)),
        "next": dense(keys[5], (WIDTH, 127)),
        "after": dense(keys[6], (WIDTH, 127)),
    }


def forward(params: Any, at: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(main, load, second) in nats, 1 for experts that are used alike, nats; and their use."""
    codes, _ = text()
    before = codes[at[:, None] - jnp.arange(CONTEXT, 0, -1)]
    x = jax.nn.relu(
        apply(params["into"], params["embed"][before].reshape(len(at), -1), jax.nn.relu)
    )
    gates = jax.nn.softmax(apply(params["gates"], x, jax.nn.relu))
    chosen = jax.nn.one_hot(jnp.argmax(gates, 1), EXPERTS)
    hidden = jax.nn.relu(jnp.einsum("nw,ewv->nev", x, params["first"]))
    x = x + jnp.einsum("nev,evw,ne->nw", hidden, params["second"], chosen * gates)

    def cross_entropy(head: str, places: jax.Array) -> jax.Array:
        found = apply(params[head], x, jax.nn.relu)
        return optax.softmax_cross_entropy_with_integer_labels(found, codes[places]).mean()

    use = jnp.mean(chosen, 0)
    load = EXPERTS * jnp.sum(use * jnp.mean(gates, 0))
    return (cross_entropy("next", at), load, cross_entropy("after", at + 1)), use


def losses_fn(params: Any, at: jax.Array) -> tuple[jax.Array, ...]:
    return forward(params, at)[0]


def make_step(method: Method) -> tuple[Any, Any]:
    """``(carry, positions) -> carry, losses`` and ``params -> first carry``."""
    adamw = optax.adamw(optax.cosine_decay_schedule(RATE, STEPS))
    balanced = balanced_value_and_grad(
        losses_fn, method.rule(), measure_on=method.measure_on, every=method.every
    )

    def step(carry: Any, at: jax.Array) -> Any:
        params, state, opt_state = carry
        (losses, grads), state = balanced.value_and_grad(params, state, at)
        updates, opt_state = adamw.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), losses

    return step, lambda params: (params, balanced.init(params), adamw.init(params))


def train(method: Method, seed: int) -> dict[str, float]:
    """Scores on the test text: nats, and the part of the busiest expert times their number."""
    step, begin = make_step(method)
    start, batches = jax.random.split(jax.random.key(seed))
    _, bounds = text()

    @jax.jit
    def run() -> Any:
        def update(carry: Any, key: jax.Array) -> Any:
            at = jax.random.randint(key, [BATCH], CONTEXT, bounds[1] - 1)
            return step(carry, at)[0], None

        carry, _ = jax.lax.scan(update, begin(init(start)), jax.random.split(batches, STEPS))
        at = jnp.linspace(bounds[2] + CONTEXT, bounds[3] - 2, 8192).astype(int)
        (main, _, second), use = forward(carry[0], at)
        return main, second, EXPERTS * use.max(), carry[1].task_weights

    main, second, busiest, weights = jax.device_get(run())
    return {
        "main": float(main),
        "second": float(second),
        "busiest": float(busiest),
        "load weight": float(weights[1]),
        "second weight": float(weights[2]),
    }


def measure(method: Method, seeds: int) -> dict[str, Any]:
    runs = [train(method, seed) for seed in range(seeds)]
    return {
        key: {
            "mean": float(np.mean([run[key] for run in runs])),
            "deviation": float(np.std([run[key] for run in runs], ddof=1)),
        }
        for key in runs[0]
    }


def step_times(rounds: int) -> dict[str, float]:
    """The time of a step over that with fixed constants."""
    runs = {}
    for name in ("constants .01, .3", "equalize", "equalize, on the gates", "equalize, every=10"):
        step, begin = make_step(METHODS[name])
        carry, at = begin(init(jax.random.key(0))), CONTEXT + jnp.arange(BATCH)
        compiled = _measure.compile_step(step, carry, at)
        runs[name] = _measure.runner(compiled, carry, at, 50)
    return _measure.ratios(_measure.interleaved(runs, rounds), "constants .01, .3")


def cells(row: dict[str, Any], time: float | None) -> list[str]:
    """What the tables show of a method."""
    scores = [f"{row[key]['mean']:.3f} ± {row[key]['deviation']:.3f}" for key in ("main", "second")]
    return [
        *scores,
        f"{row['busiest']['mean']:.1f} ± {row['busiest']['deviation']:.1f}",
        f"{row['load weight']['mean']:.2g}, {row['second weight']['mean']:.2g}",
        "" if time is None else f"{time:.2f}",
    ]


COLUMNS = ("next, nats", "after next, nats", "busiest expert", "last weights", "step / constants")


def main(seeds: int = 3, rounds: int = 21, out: Path = RESULT) -> None:
    """Measures and writes.

    Args:
      seeds: runs of each method.
      rounds: interleaved rounds of the steps' times.
      out: the JSON to write.
    """
    results = {name: measure(method, seeds) for name, method in METHODS.items()}
    times = step_times(rounds)
    rows = [[name, *cells(row, times.get(name))] for name, row in results.items()]
    _measure.show("A main loss with auxiliaries", ["", *COLUMNS], rows)
    _measure.write(out, {"seeds": seeds, "steps": STEPS, "results": results, "times": times})


if __name__ == "__main__":
    tyro.cli(main)
