"""Physics-informed networks: ``python -m benchmarks.physics``.

Five problems with exact or spectral references: Burgers, Allen-Cahn, an advection equation whose
residual is weighted causally, an inverse problem with one unknown coefficient, and an ODE with a
single-point condition. Fixed weights against the rules of jaxpi and jinns, and against `equalize`,
`config` and `upgrad`. Adam with a cosine decay; each method has the learning rate that is best on
validation points, three seeds. At equal steps, and at the time that fixed weights take. Then
optimizers that precondition: Muon, and L-BFGS on fixed points. What is there already is not run
again. Prints tables and writes benchmarks/physics.json.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import _measure
from benchmarks.evidence import problems as known
from benchmarks.evidence.problems import Problem, apply, dense, relative_error, second_derivative
from gaba_jax import balanced_value_and_grad, weighting
from gaba_jax.weighting import Weighting

RESULT = Path(__file__).with_suffix(".json")
SEEDS = 3
STEPS = 5000
RATES = (10**-2.5, 1e-2, 10**-1.5)  # of Adam, at the start
LBFGS_STEPS = 2000
CHECKS = 20  # errors are taken so often in a run
FIXED = "fixed"


def averaged(rule: Weighting, beta: float = 0.99) -> Weighting:
    """The weights of a rule without memory, averaged from their initial ones; any sum."""

    def update(stats: Any, average: Any) -> tuple[jax.Array, jax.Array]:
        average = beta * average + (1 - beta) * rule.update(stats, rule.init())[0]
        return average, average

    return rule._replace(init=lambda: jnp.asarray(rule.initial_weights, jnp.float32), update=update)


RULES: dict[str, Callable[[int], Weighting]] = {
    FIXED: weighting.uniform,
    "jaxpi, gradient norms": lambda k: averaged(weighting.inverse_norm(k, scale="mean")),
    "jaxpi, ntk": weighting.ntk,
    "soft_adapt": weighting.soft_adapt,
    "relobralo": weighting.relobralo,
    "lr_annealing": weighting.lr_annealing,
    "equalize": weighting.equalize,
    "config": weighting.config,
    "upgrad": weighting.upgrad,
}
COMMUNITY = ("jaxpi, gradient norms", "jaxpi, ntk", "soft_adapt", "relobralo", "lr_annealing")
SPEED, CHUNKS, CAUSAL = 10.0, 16, 1.0  # of the advection, and of its causal weights
COEFFICIENT = 0.1  # that the inverse problem is to find


def advection() -> Problem:
    """u_t + SPEED u_x = 0 with u(x, 0) = sin x, periodic: u = sin(x - SPEED t), t up to 1.

    The residual of a stretch of time counts once those before it are small:
    exp(-CAUSAL times their sum), held constant.
    """
    grids = [
        jnp.meshgrid(jnp.linspace(a, 6.2, 40), jnp.linspace(b, 1, 20))
        for a, b in ((0, 0), (0.05, 0.03))
    ]

    def u_of(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return known.solution(params, jnp.cos(x), jnp.sin(x), t)

    def losses(params: Any, key: jax.Array) -> known.Losses:
        def residual(x: jax.Array, t: jax.Array) -> jax.Array:
            u_x, u_t = jax.grad(lambda x, t: u_of(params, x, t), argnums=(0, 1))(x, t)
            return u_t + SPEED * u_x

        keys = jax.random.split(key, 3)
        x = jax.random.uniform(keys[0], (CHUNKS, 16), maxval=2 * jnp.pi)
        t = (jnp.arange(CHUNKS)[:, None] + jax.random.uniform(keys[1], x.shape)) / CHUNKS
        of_chunks = jnp.mean(jax.vmap(jax.vmap(residual))(x, t) ** 2, axis=1)
        before = jnp.cumsum(of_chunks) - of_chunks
        causal = jax.lax.stop_gradient(jnp.exp(-CAUSAL * before))
        x_0 = jax.random.uniform(keys[2], [64], maxval=2 * jnp.pi)
        at_start = jax.vmap(lambda x: u_of(params, x, jnp.zeros_like(x)))(x_0)
        return jnp.mean(causal * of_chunks), jnp.mean((at_start - jnp.sin(x_0)) ** 2)

    def evaluate(params: Any, split: int) -> jax.Array:
        x, t = grids[split]
        predicted = jax.vmap(jax.vmap(lambda x, t: u_of(params, x, t)))(x, t)
        return relative_error(predicted, jnp.sin(x - SPEED * t))

    return known.physics(("residual", "initial"), (3, 32, 32, 32, 1), losses, evaluate, 1500)


def heat(x: Any, t: Any) -> Any:
    """u of u_t = COEFFICIENT u_xx on [0, 1], 0 at both ends."""
    modes = ((1.0, 1), (0.5, 3))
    return sum(
        size * jnp.exp(-COEFFICIENT * (n * jnp.pi) ** 2 * t) * jnp.sin(n * jnp.pi * x)
        for size, n in modes
    )


def inverse() -> Problem:
    """u_t = D u_xx with D unknown, from 100 noisy observations; metrics: u, and D."""
    keys = jax.random.split(jax.random.key(1), 2)
    x_seen, t_seen = jax.random.uniform(keys[0], (2, 100))
    seen = heat(x_seen, t_seen) + 0.02 * jax.random.normal(keys[1], (100,))
    grids = [jnp.meshgrid(jnp.linspace(a, 1, 30), jnp.linspace(a, 1, 30)) for a in (0.0, 0.02)]

    def init(key: jax.Array) -> Any:
        return {"layers": dense(key, (2, 32, 32, 32, 1)), "log_coefficient": jnp.zeros([])}

    def u_of(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return apply(params["layers"], jnp.stack([x, t]), jnp.tanh)[0]

    def losses(params: Any, key: jax.Array) -> known.Losses:
        inner, border = jax.random.split(key)

        def residual(x: jax.Array, t: jax.Array) -> jax.Array:
            u_xx = second_derivative(lambda x: u_of(params, x, t), x)[2]
            u_t = jax.jvp(lambda t: u_of(params, x, t), (t,), (jnp.ones_like(t),))[1]
            return u_t - jnp.exp(params["log_coefficient"]) * u_xx

        x, t = jax.random.uniform(inner, (2, 128))
        ends = jax.vmap(lambda t: jnp.stack([u_of(params, e + 0 * t, t) for e in (0.0, 1.0)]))
        found = jax.vmap(lambda x, t: u_of(params, x, t))(x_seen, t_seen)
        return (
            jnp.mean(jax.vmap(residual)(x, t) ** 2),
            jnp.mean((found - seen) ** 2),
            jnp.mean(ends(jax.random.uniform(border, [32])) ** 2),
        )

    def evaluate(params: Any, split: int) -> jax.Array:
        x, t = grids[split]
        predicted = jax.vmap(jax.vmap(lambda x, t: u_of(params, x, t)))(x, t)
        of_u = relative_error(predicted, heat(x, t))
        of_d = jnp.abs(jnp.exp(params["log_coefficient"]) / COEFFICIENT - 1)
        return jnp.concatenate([of_u, of_d[None]])

    tasks = ("residual", "data", "boundary")
    made = known.physics(tasks, (2, 1), losses, evaluate, 1500)
    return made._replace(init=init, metrics=("relative L2 error", "relative error of D"))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "Burgers": known.burgers,
    "Allen-Cahn": known.allen_cahn,
    "advection": advection,
    "inverse": inverse,
    "ODE": known.ode,
}


def make_run(problem: Problem, rule: Weighting, steps: int, optimizer: str = "adam") -> Any:
    """``(seed, rate) -> [CHECKS, 2, M]`` errors, validation and test."""
    balanced = balanced_value_and_grad(problem.losses, rule)
    every = steps // CHECKS

    def run(seed: jax.Array, rate: jax.Array) -> jax.Array:
        start, batches = jax.random.split(jax.random.key(seed))
        params = problem.init(start)
        schedule = optax.cosine_decay_schedule(rate, steps)
        tx = optax.contrib.muon(schedule) if optimizer == "muon" else optax.adam(schedule)

        def update(carry: Any, step: jax.Array) -> Any:
            params, state, opt_state = carry
            key = jax.random.fold_in(batches, step)
            (_, grads), state = balanced.value_and_grad(params, state, key)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), state, opt_state), None

        def stretch(carry: Any, first: jax.Array) -> Any:
            carry, _ = jax.lax.scan(update, carry, first + jnp.arange(every))
            return carry, jnp.stack([problem.evaluate(carry[0], split) for split in (0, 1)])

        carry = params, balanced.init(params), tx.init(params)
        return jax.lax.scan(stretch, carry, every * jnp.arange(CHECKS))[1]

    return run


def measure(problem: Problem, rule: Weighting, steps: int, optimizer: str = "adam") -> Any:
    """Errors on test points [CHECKS, SEEDS, M] at the best rate, and that rate."""
    run = make_run(problem, rule, steps, optimizer)
    rates = tuple(3 * rate for rate in RATES) if optimizer == "muon" else RATES
    seeds, of_runs = np.meshgrid(np.arange(SEEDS), np.asarray(rates, np.float32))
    errors = jax.jit(jax.vmap(run))(jnp.asarray(seeds.ravel()), jnp.asarray(of_runs.ravel()))
    errors = np.asarray(errors).reshape(len(rates), SEEDS, CHECKS, 2, -1)
    errors = np.where(np.isfinite(errors), errors, np.inf)
    best = int(np.argmin(errors[:, :, -1, 0, 0].mean(axis=1)))
    return {
        "rate": rates[best],
        "errors": errors[best, :, :, 1].transpose(1, 0, 2).tolist(),
    }


def step_times(problem: Problem, rounds: int = 7) -> dict[str, float]:
    """The time of a step of each method over that of fixed weights."""
    steps, runs = 200, {}
    for name, make_rule in RULES.items():
        run = make_run(problem, make_rule(len(problem.tasks)), steps)
        compiled = jax.jit(run).lower(jnp.int32(0), jnp.float32(1e-3)).compile()
        runs[name] = functools.partial(_wait, compiled)
    return _measure.ratios(_measure.interleaved(runs, rounds, 1), FIXED)


def _wait(compiled: Any) -> None:
    jax.block_until_ready(compiled(jnp.int32(0), jnp.float32(1e-3)))


def lbfgs(problem: Problem, rule: Weighting | None, steps: int, hold: int) -> list[float]:
    """Test errors of the seeds: L-BFGS on fixed points, with the weights held for ``hold`` steps.

    ``rule`` None keeps equal weights.
    """
    k = len(problem.tasks)

    def run(seed: jax.Array) -> jax.Array:
        start, batch = jax.random.split(jax.random.key(seed))
        params = problem.init(start)
        balanced = balanced_value_and_grad(problem.losses, rule or weighting.uniform(k))

        def stretch(carry: Any, _: Any) -> Any:
            params, state = carry
            weights = jnp.full(k, 1 / k)
            if rule is not None:
                _, state = balanced.value_and_grad(params, state, batch)
                weights = state.task_weights

            def weighted(params: Any) -> jax.Array:
                return weights @ jnp.stack(list(problem.losses(params, batch)))

            tx = optax.lbfgs()

            def update(carry: Any, _: Any) -> Any:
                params, opt_state = carry
                value, grads = optax.value_and_grad_from_state(weighted)(params, state=opt_state)
                updates, opt_state = tx.update(
                    grads, opt_state, params, value=value, grad=grads, value_fn=weighted
                )
                return (optax.apply_updates(params, updates), opt_state), None

            (params, _), _ = jax.lax.scan(update, (params, tx.init(params)), length=hold)
            return (params, state), None

        carry = params, balanced.init(params)
        (params, _), _ = jax.lax.scan(stretch, carry, length=steps // hold)
        return problem.evaluate(params, 1)[0]

    return np.asarray(jax.jit(jax.vmap(run))(jnp.arange(SEEDS))).tolist()


def at_equal_time(result: dict[str, Any], time: float) -> list[float]:
    """Of each seed the error after as long as fixed weights take for all their steps."""
    check = min(CHECKS, max(1, int(CHECKS / max(time, 1.0) + 1e-6)))
    return [row[0] for row in result["errors"][check - 1]]


def verdict(results: dict[str, Any]) -> dict[str, Any]:
    """Per problem the best error of fixed weights, the communities' rules, and ours."""
    found = {}
    for name, result in results.items():
        errors = {
            m: float(np.mean([row[0] for row in of["errors"][-1]]))
            for m, of in result["adam"].items()
        }
        best = min(COMMUNITY, key=errors.__getitem__)
        ours = min(("equalize", "config"), key=errors.__getitem__)
        found[name] = {
            "fixed": errors[FIXED],
            "community": [best, errors[best]],
            "ours": [ours, errors[ours]],
            "at or below": errors[ours] <= errors[best],
            "equalize over fixed": errors["equalize"] / errors[FIXED],
        }
    return found


def main(only: str = "", steps: int = STEPS, times: bool = True, out: Path = RESULT) -> None:
    """Measures what is not there yet, and writes.

    Args:
      only: the one problem to run; default all of them.
      steps: of a run.
      times: whether to time the steps of problems that have no times yet.
      out: the JSON to write.
    """
    results = json.loads(out.read_text())["results"] if out.exists() else {}
    for name, make in PROBLEMS.items():
        if only not in ("", name):
            continue
        problem, result = make(), results.setdefault(name, {"adam": {}, "muon": {}, "lbfgs": {}})
        k = len(problem.tasks)

        def save() -> None:
            document = {"seeds": SEEDS, "results": results, "verdict": {}}
            done = {n: r for n, r in results.items() if len(r["adam"]) == len(RULES)}
            _measure.write(out, document | {"verdict": verdict(done)})

        for method, make_rule in RULES.items():
            if method not in result["adam"]:
                result["adam"][method] = measure(problem, make_rule(k), steps)
                print(
                    name, method, np.mean(result["adam"][method]["errors"][-1], axis=0), flush=True
                )
                save()
        for method in (FIXED, "equalize"):
            if method not in result["muon"]:
                result["muon"][method] = measure(problem, RULES[method](k), steps, "muon")
                save()
            if method not in result["lbfgs"]:
                rule = None if method == FIXED else RULES[method](k)
                result["lbfgs"][method] = lbfgs(problem, rule, min(steps, LBFGS_STEPS), 100)
                save()
        if times and "times" not in result:
            result["times"] = step_times(problem)
        save()
        show(name, result)
    print(json.dumps(verdict(results), indent=1))


def cells(result: dict[str, Any], method: str) -> list[str]:
    """What the tables show of a method: errors at equal steps and time, and the step."""
    of, time = result["adam"][method], result.get("times", {}).get(method)
    final = [row[0] for row in of["errors"][-1]]
    timed = "" if time is None else f"{np.mean(at_equal_time(of, time)):.2g}"
    return [
        f"{np.mean(final):.2g} ± {np.std(final, ddof=1):.1g}",
        timed,
        "" if time is None else f"{time:.2f}",
        f"{of['rate']:.2g}",
    ]


COLUMNS = ("error, equal steps", "error, equal time", "step / fixed", "rate")


def show(name: str, result: dict[str, Any]) -> None:
    rows = [[method, *cells(result, method)] for method in RULES]
    _measure.show(name, ["", *COLUMNS], rows)


if __name__ == "__main__":
    tyro.cli(main)
