"""The study of weightings: what chooses and scores, and that the page says what the runs say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.evidence import _page, problems, runs, scores


def two_tasks(**changes):
    """A problem of two linear regressions on one parameter each, small enough to run."""

    def losses(params, key):
        x = jax.random.normal(key, [8])
        return jnp.mean((x * (params["a"] - 1)) ** 2), 100 * jnp.mean((x * (params["b"] + 1)) ** 2)

    def evaluate(params, split):
        return jnp.stack([(params["a"] - 1) ** 2, 1 / (1 + (params["b"] + 1) ** 2)]) + split

    made = problems.Problem(
        field="test",
        tasks=("first", "second"),
        metrics=("error", "quality"),
        higher_is_better=(False, True),
        init=lambda key: {"a": jax.random.normal(key), "b": jnp.zeros([])},
        losses=losses,
        evaluate=evaluate,
        steps=4,
    )
    return made._replace(**changes)


def test_worse_is_in_percent_of_the_baseline():
    found = scores.worse(np.array([[2.0, 0.5], [1.0, 1.5]]), np.array([1.0, 1.0]), [False, True])
    np.testing.assert_allclose(found, [[100, 50], [0, -50]])


def kept_runs(folder, validation, test):
    """Runs of uniform and of both tasks alone, [rates] of each, the same for all seeds."""
    for method in validation:
        path = runs.run_file(folder, "made up", method)
        path.parent.mkdir(parents=True, exist_ok=True)
        rates = np.repeat(np.array(runs.RATES), len(runs.SEEDS))
        of_seeds = [
            np.repeat(np.array(of[method]), len(runs.SEEDS), 0) for of in (validation, test)
        ]
        document = {
            "method": method,
            "seconds": 1.0,
            "settings": {"learning_rate": rates.tolist()},
            "validation": of_seeds[0].tolist(),
            "test": of_seeds[1].tolist(),
        }
        path.write_text(json.dumps(document))


def test_the_rate_is_chosen_on_validation_data_and_the_test_data_scored(tmp_path):
    nan = float("nan")
    validation = {
        "uniform": [[4, 1], [2, 1], [3, 1], [nan, 1], [5, 1]],
        "alone, first": [[9, 0], [9, 0], [2, 0], [9, 0], [9, 0]],
        "alone, second": [[0, 1], [0, 3], [0, 2], [0, nan], [0, 1]],
    }
    test = {
        "uniform": [[1, 1], [6, 2], [1, 1], [1, 1], [1, 1]],
        "alone, first": [[1, 0], [1, 0], [4, 0], [1, 0], [1, 0]],
        "alone, second": [[0, 1], [0, 4], [0, 1], [0, 1], [0, 1]],
    }
    kept_runs(tmp_path, validation, test)
    rows, tuning = scores.select("made up", two_tasks(), tmp_path)
    table = scores.Table(rows)
    # Rate 1 for uniform; the baseline is 4 (of rate 2) and 4 (of rate 1): +50 % and +50 %.
    assert table.row("made up", "uniform").learning_rate == pytest.approx(runs.RATES[1])
    assert table.score("made up", "uniform") == pytest.approx(50)
    assert table.row("made up", "alone, second").learning_rate == pytest.approx(runs.RATES[1])
    assert len(tuning) == 3 * len(runs.RATES)
    path = tmp_path / "results.csv"
    scores.write_csv(path, rows)
    again = scores.read_csv(path)
    assert [r.method for r in again] == [r.method for r in rows]
    np.testing.assert_allclose(again[2].scores, rows[2].scores, rtol=1e-4)


def test_differences_from_uniform():
    def row(method, values):
        metrics = tuple((value, value) for value in values)
        return scores.Row("one", method, 1.0, 1.0, float(np.mean(values)), tuple(values), metrics)

    table = scores.Table(
        [
            row("uniform", [1.0, 2, 3, 4, 5]),
            row("static, 2 : 1", [0.5, 1.5, 2.5, 3.5, 4.5]),
            row("better", [0.0, 1.1, 1.9, 3, 4]),
            row("noisy", [0.0, 5, 1, 2, 9]),
            row("diverged", [1.0, 2, np.nan, 4, 5]),
        ]
    )
    mean, low, high = table.difference("one", "better")
    assert mean == pytest.approx(-1)
    assert -1.1 <= low < -1 < high <= -0.9
    verdicts = [table.beyond_noise("one", m) for m in ("better", "noisy", "diverged", "uniform")]
    assert verdicts == [-1, 0, 1, 0]
    assert table.best_static("one").method == "static, 2 : 1"
    assert table.close_to_static("better") == ["one"]
    assert table.ranks(("uniform", "better", "diverged")) == {
        "uniform": 2,
        "better": 1,
        "diverged": 3,
    }
    # Static weights are 100 * .5 / 2.5 percent better than uniform in both metrics.
    assert table.beyond_front("one", "uniform", [False, False]) == pytest.approx(20)


def test_the_pages_say_what_the_runs_say():
    made, page = _page.tables(scores.read_csv(_page.RESULTS)), _page.PAGE.read_text()
    for name, text in made.items():
        assert _page.start(name) + text + _page.END in page, name
    assert _page.start("answer") + made["answer"] + _page.END in _page.README.read_text()


def test_what_to_take_from_it():
    table = scores.Table(scores.read_csv(_page.RESULTS))
    sure = {p: table.beyond_noise(p, "equalize") for p in table.problems}
    assert sum(verdict == 0 for verdict in sure.values()) == 9
    assert sure["ODE"] == 1
    assert all(
        sure[p] == -1 and table.score(p, "equalize") < -33 for p in ("Burgers", "Allen-Cahn")
    )
    tuned = {p: table.score(p, table.best_uniform(p).method) for p in table.problems}
    ahead = [p for p, score in tuned.items() if score < table.score(p, "equalize")]
    assert len(ahead) == 7
    for p in ("Burgers", "Allen-Cahn"):
        assert 29 < tuned[p] - table.score(p, "equalize") < 30
    of_ode = {method: 1 + table.score("ODE", method) / 100 for method in scores.ONE_RUN}
    assert min(of_ode, key=of_ode.get) == "uniform"
    assert round(min(of_ode[method] for method in runs.RULES), 1) == 1.7
    assert round(of_ode["equalize"]) == 3


@pytest.mark.slow
def test_runs_are_kept_and_resumed(tmp_path, capsys):
    problem = two_tasks()
    todo = [c for c in runs.cells(problem) if c.method in ("uniform", "alone, first", "equalize")]
    runs.run("small", problem, todo, tmp_path)
    first = capsys.readouterr().out
    runs.run("small", problem, todo, tmp_path)
    assert first.count("small:") == 3
    assert not capsys.readouterr().out
    document = json.loads(runs.run_file(tmp_path, "small", "uniform").read_text())
    assert np.shape(document["validation"]) == (len(runs.RATES) * len(runs.SEEDS), 2)
    # The same seed at the same rate: the same numbers, whatever runs beside it.
    alone = runs.make_program(problem, None)(
        jax.tree.map(lambda leaf: leaf[3:4], runs.grid(todo[0], problem))
    )
    np.testing.assert_allclose(alone[0][0], document["validation"][3], rtol=1e-6)


def test_every_method_and_static_weight_is_run():
    two = [cell.method for cell in runs.cells(two_tasks())]
    assert len([m for m in two if m.startswith("static")]) == len(runs.RATIOS) - 1  # and uniform
    assert set(two) >= {"uniform", "alone, first", "alone, second", *runs.RULES}
    three = two_tasks(
        tasks=("a", "b", "c"),
        metrics=("error",),
        higher_is_better=(False,),
        losses=lambda params, key: (jnp.float32(1.0), jnp.float32(2.0), jnp.float32(4.0)),
    )
    cells = {cell.method: cell for cell in runs.cells(three, long_b2=("uniform",))}
    np.testing.assert_allclose(
        cells["static, inverse initial losses"].weights, np.array([4, 2, 1]) / 7
    )
    assert len([m for m in cells if m.startswith("static, random")]) == runs.RANDOM_POINTS
    assert cells["uniform, b2=.999"].b2 == runs.LONG_B2
    assert not any(m.startswith("alone") for m in cells)


def test_the_solution_of_the_ode_has_no_loss_and_no_error(monkeypatch):
    monkeypatch.setattr(problems, "solution", lambda _, t: jnp.exp(-3 * t))
    problem = problems.ode()
    np.testing.assert_allclose(problem.losses(None, jax.random.key(0)), 0, atol=1e-10)
    for split in (0, 1):
        np.testing.assert_allclose(problem.evaluate(None, split), 0, atol=1e-6)


def test_burgers_solution():
    """By central differences, away from the shock at x = 0; odd, and 0 at the border."""
    x, t = np.meshgrid(np.linspace(0.3, 0.95, 14), np.linspace(0.1, 0.9, 9))
    step = 1e-4

    def u(dx=0.0, dt=0.0):
        return problems.burgers_solution(x + dx, t + dt)

    u_t, u_x = (u(dt=step) - u(dt=-step)) / (2 * step), (u(step) - u(-step)) / (2 * step)
    u_xx = (u(step) - 2 * u() + u(-step)) / step**2
    np.testing.assert_allclose(u_t + u() * u_x - problems.NU * u_xx, 0, atol=1e-4)
    np.testing.assert_allclose(u(), -problems.burgers_solution(-x, t), atol=1e-12)
    np.testing.assert_allclose(problems.burgers_solution(np.ones(9), t[:, 0]), 0, atol=1e-9)
    early = problems.burgers_solution(x, np.full_like(x, 1e-5))
    np.testing.assert_allclose(early, -np.sin(np.pi * x), atol=1e-4)


def test_allen_cahn_solution():
    """The equation by central differences in time; half the steps change nothing."""
    x, u = problems.allen_cahn_solution()
    frequencies = np.pi * np.fft.fftfreq(len(x), 1 / len(x))
    u_xx = np.fft.ifft(-(frequencies**2) * np.fft.fft(u)).real
    u_t = (u[2:] - u[:-2]) * (len(u) - 1) / 2
    residual = u_t - problems.DIFFUSION * u_xx[1:-1] - 5 * (u - u**3)[1:-1]
    # Not near x = +-1, where the start, continued periodically, has a kink.
    np.testing.assert_allclose(residual[:, np.abs(x) < 0.9], 0, atol=1e-3)
    _, coarse = problems.allen_cahn_solution(1000)
    np.testing.assert_allclose(u[::2], coarse, atol=1e-5)
