"""The runs of the study: every method with its own learning rates and seeds, in one program."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.evidence.problems import Losses, Problem
from gaba_jax import balanced_value_and_grad, weighting

SEEDS = range(5)
RATES = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)  # times the problem's learning rate
B2, LONG_B2 = 0.99, 0.999  # of Adam's second moment
WEIGHT_DECAY = 1e-4
WEIGHT_DECAYS = (1e-2, 1e-1, 1.0)  # tried with uniform weights too
RATIOS = np.logspace(-3, 3, 9)  # of two static weights
RANDOM_POINTS = 16  # of more

Rule = Callable[[int], weighting.Weighting]
RULES: dict[str, Rule] = {
    "equalize": weighting.equalize,
    "gaba": weighting.gaba,
    "inverse_norm": weighting.inverse_norm,
    "inverse_norm, power .5": lambda k: weighting.inverse_norm(k, power=0.5),
    "gradnorm": weighting.gradnorm,
    "uncertainty": weighting.uncertainty,
    "dynamic_weight_average": weighting.dynamic_weight_average,
    "famo": weighting.famo,
    "pcgrad": weighting.pcgrad,
    "cagrad": weighting.cagrad,
    "upgrad": weighting.upgrad,
    "normalized(upgrad)": lambda k: weighting.normalized(weighting.upgrad(k)),
    "nash_mtl": weighting.nash_mtl,
    "config": weighting.config,
}


def damped(num_tasks: int, damp: Callable[[jax.Array], jax.Array]) -> weighting.Weighting:
    """``equalize`` whose contributions keep ``damp`` of the logarithm of their distance.

    [K], of the norms to their geometric mean; nothing of it is left by ``equalize`` itself.
    """
    rule = weighting.equalize(num_tasks)

    def update(stats: weighting.TaskStats, state: Any) -> tuple[jax.Array, Any]:
        weights, state = rule.update(stats, state)
        distance = -jnp.log(weights * num_tasks)
        return weights * jnp.exp(damp(distance)), state

    return rule._replace(update=update)


def within(num_tasks: int, ratio: float) -> weighting.Weighting:
    """Contributions at most ``ratio`` apart: uniform weights where the norms are not further."""
    limit = np.log(ratio) / 2
    return damped(num_tasks, lambda distance: jnp.clip(distance, -limit, limit))


# What equalize was chosen from: its options, one at a time, and less than equal contributions.
VARIANTS: dict[str, Rule] = {
    "equalize, rho .01": lambda k: weighting.equalize(k, rho=0.01),
    "equalize, beta .99": lambda k: weighting.equalize(k, beta=0.99),
    "equalize, power .5": lambda k: damped(k, lambda distance: distance / 2),
    "equalize, within 10": lambda k: within(k, 10.0),
    "gaba, debiased": lambda k: weighting.gaba(k, debias=True, warmup_steps=0, min_weight=0.0),
}


class Setting(NamedTuple):
    """What one run has of its own; arrays of these are one program's runs."""

    seed: Any
    learning_rate: Any
    b2: Any
    weight_decay: Any
    weights: Any  # [K], of static weights


class Cell(NamedTuple):
    """A method on a problem, with all learning rates and seeds. ``rule`` None: static weights."""

    method: str
    rule: Rule | None = None
    weights: tuple[float, ...] = ()
    b2: float = B2
    weight_decay: float = WEIGHT_DECAY


def grid(cell: Cell, problem: Problem) -> Setting:
    """The settings of a cell, learning rates outermost."""
    rates, seeds = np.meshgrid(np.asarray(RATES, np.float32), np.arange(len(SEEDS)), indexing="ij")
    count, k = rates.size, len(problem.tasks)
    weights = np.asarray(cell.weights or [1 / k] * k, np.float32)
    return Setting(
        jnp.asarray(seeds.ravel()),
        jnp.asarray(rates.ravel() * problem.learning_rate),
        jnp.full(count, cell.b2, jnp.float32),
        jnp.full(count, cell.weight_decay, jnp.float32),
        jnp.tile(weights, (count, 1)),
    )


def make_program(problem: Problem, rule: weighting.Weighting | None) -> Any:
    """``settings -> (validation, test)`` [runs, M] of the trained models, jitted."""
    balanced = balanced_value_and_grad(
        problem.losses, weighting.uniform(len(problem.tasks)) if rule is None else rule
    )

    def weighted(losses: Losses, weights: jax.Array) -> jax.Array:
        return weights @ jnp.stack(list(losses))

    def run(setting: Setting) -> tuple[jax.Array, jax.Array]:
        start, batches = jax.random.split(jax.random.key(setting.seed))
        params = problem.init(start)
        tx = optax.adamw(
            optax.cosine_decay_schedule(setting.learning_rate, problem.steps),
            b2=setting.b2,
            weight_decay=setting.weight_decay,
        )

        def update(carry: Any, step: jax.Array) -> tuple[Any, None]:
            params, state, opt_state = carry
            key = jax.random.fold_in(batches, step)
            if rule is None:
                grads = jax.grad(lambda p: weighted(problem.losses(p, key), setting.weights))(
                    params
                )
            else:
                (_, grads), state = balanced.value_and_grad(params, state, key)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), state, opt_state), None

        carry = params, balanced.init(params) if rule is not None else (), tx.init(params)
        (params, _, _), _ = jax.lax.scan(update, carry, jnp.arange(problem.steps))
        return problem.evaluate(params, 0), problem.evaluate(params, 1)

    # One after the other: as fast on a CPU as a batch, and a rule's loops end when theirs do.
    return jax.jit(lambda settings: jax.lax.map(run, settings))


def _initial_losses(problem: Problem) -> tuple[float, ...]:
    key = jax.random.key(0)
    return tuple(float(loss) for loss in problem.losses(problem.init(key), key))


def static_cells(problem: Problem) -> Iterator[Cell]:
    """Weights that stay: each task alone, uniform with more weight decay, and points between."""
    k = len(problem.tasks)

    def cell(method: str, weights: Any, **changes: Any) -> Cell:
        positive = np.asarray(weights, float)
        return Cell(method, weights=tuple((positive / positive.sum()).tolist()), **changes)

    yield cell("uniform", np.ones(k))
    for decay in WEIGHT_DECAYS:
        yield cell(f"uniform, weight decay {decay:g}", np.ones(k), weight_decay=decay)
    if problem.has_single_tasks:
        for i, name in enumerate(problem.tasks):
            yield cell(f"alone, {name}", np.arange(k) == i)
    if k == 2:
        for ratio in RATIOS:
            if ratio != 1:
                yield cell(f"static, {ratio:.3g} : 1", [ratio, 1])
        return
    inverse = 1 / np.asarray(_initial_losses(problem))
    yield cell("static, inverse initial losses", inverse)
    if problem.variances is not None:
        yield cell("static, inverse variances", 1 / np.asarray(problem.variances, float))
    rng = np.random.default_rng(0)
    for i in range(RANDOM_POINTS):
        yield cell(f"static, random {i}", inverse * np.exp(rng.normal(size=k)))


def cells(problem: Problem, long_b2: tuple[str, ...] = ()) -> list[Cell]:
    """All of a problem; the methods in ``long_b2`` once more with Adam's usual second moment."""
    found = [
        *static_cells(problem),
        *(Cell(name, rule) for name, rule in (RULES | VARIANTS).items()),
    ]
    again = [cell for cell in found if cell.method in long_b2]
    return found + [c._replace(method=f"{c.method}, b2=.999", b2=LONG_B2) for c in again]


def run_file(out: Path, problem: str, method: str) -> Path:
    return out / problem / f"{method}.json"


def run(name: str, problem: Problem, todo: list[Cell], out: Path) -> None:
    """Runs the cells that ``out`` does not hold; each is written, whole, when it is done."""
    settings = list(Setting._fields)
    static = make_program(problem, None)
    for cell in todo:
        path = run_file(out, name, cell.method)
        if path.exists():
            continue
        rule = None if cell.rule is None else cell.rule(len(problem.tasks))
        program = static if rule is None else make_program(problem, rule)
        arguments = grid(cell, problem)
        compiled = program.lower(arguments).compile()
        began = time.perf_counter()
        validation, test = jax.block_until_ready(compiled(arguments))
        seconds = time.perf_counter() - began
        document = {
            "problem": name,
            "method": cell.method,
            "seconds": seconds / len(arguments.seed),
            "settings": {s: np.asarray(getattr(arguments, s)).tolist() for s in settings[:4]},
            "weights": list(cell.weights),
            "validation": np.asarray(validation, float).tolist(),
            "test": np.asarray(test, float).tolist(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(document))
        part.replace(path)
        print(f"{name}: {cell.method}, {seconds:.1f} s", flush=True)
