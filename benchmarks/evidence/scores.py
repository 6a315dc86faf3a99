"""What the runs say: learning rates chosen on validation data, then one score of the test data.

The score is the field's: the mean over metrics of how much worse than a baseline a run is, in
percent of it; below 0 is better. The baseline of metric i is training task i alone, or, where no
task makes sense by itself, uniform weights; each with a learning rate of its own.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.evidence import runs
from benchmarks.evidence.problems import Problem

UNIFORM = "uniform"
ONE_RUN = (UNIFORM, *runs.RULES)  # the methods that a rank is given to
CLOSE = 2.0  # percent, to the best static weights
LEVEL = 0.05
# Every way to draw as many seeds as there are with replacement: the bootstrap without a draw.
RESAMPLES = np.array(list(itertools.product(runs.SEEDS, repeat=len(runs.SEEDS))))
Array = NDArray[np.float64]


class Row(NamedTuple):
    """A method on a problem, at the learning rate that was chosen for it."""

    problem: str
    method: str
    learning_rate: float
    seconds: float
    """of one training run"""
    validation: float
    """its score, mean over seeds"""
    scores: tuple[float, ...]
    """of the test data, by seed; of a task alone of no use"""
    metrics: tuple[tuple[float, ...], ...]
    """of the test data, by seed"""


def worse(metrics: Array, base: Array, higher_is_better: Sequence[bool]) -> Array:
    """By how many percent of the baseline [M] each metric [..., M] is worse."""
    sign = np.where(higher_is_better, -1, 1)
    return 100 * sign * (metrics - base) / base


def select(name: str, problem: Problem, kept: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of a problem, and the mean validation score of every learning rate."""
    found: dict[str, Any] = {}
    for path in sorted((kept / name).glob("*.json")):
        document = json.loads(path.read_text())
        shape = len(runs.RATES), len(runs.SEEDS), len(problem.metrics)
        for split in ("validation", "test"):  # [rates, seeds, M]
            document[split] = np.array(document[split], float).reshape(shape)
        found[document["method"]] = document
    up = problem.higher_is_better
    if problem.has_single_tasks:
        alone = [found[f"alone, {task}"] for task in problem.tasks]
        sign = np.where(up, -1, 1)
        best = [_lowest(sign[i] * each["validation"][..., i]) for i, each in enumerate(alone)]
    else:
        alone = [found[UNIFORM]]
        best = [_lowest(alone[0]["validation"][..., 0])]
    chosen = list(enumerate(zip(alone, best, strict=True)))
    base = {
        split: np.array([each[split][rate, :, i].mean() for i, (each, rate) in chosen])
        for split in ("validation", "test")
    }
    rows, tuning = [], []
    for method, document in found.items():
        scores = worse(document["validation"], base["validation"], up).mean(axis=-1)
        rate = _lowest(scores)
        if problem.has_single_tasks:
            rate = next((r for each, r in zip(alone, best, strict=True) if each is document), rate)
        test = document["test"][rate]
        rates = document["settings"]["learning_rate"][:: len(runs.SEEDS)]
        rows.append(
            Row(
                name,
                method,
                rates[rate],
                document["seconds"],
                float(scores[rate].mean()),
                tuple(worse(test, base["test"], up).mean(axis=-1).tolist()),
                tuple(map(tuple, test.tolist())),
            )
        )
        tuning += [
            {"problem": name, "method": method, "learning_rate": r, "validation": s}
            for r, s in zip(rates, scores.mean(axis=1).tolist(), strict=True)
        ]
    return rows, tuning


def _lowest(scores: Array) -> int:
    """The rate whose mean over seeds of ``scores`` [rates, seeds] is lowest; NaN is the highest."""
    means = scores.mean(axis=1)
    return int(np.argmin(np.where(np.isfinite(means), means, np.inf)))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a method and problem; lists are joined by spaces, metrics of a seed by slashes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    for row in rows:
        by_seed = ["/".join(f"{value:.5g}" for value in seed) for seed in row.metrics]
        writer.writerow(
            [
                row.problem,
                row.method,
                f"{row.learning_rate:.3g}",
                f"{row.seconds:.3g}",
                f"{row.validation:.5g}",
                " ".join(f"{score:.5g}" for score in row.scores),
                " ".join(by_seed),
            ]
        )
    path.write_text(text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """What :func:`write_csv` wrote."""
    with path.open() as file:
        return [
            Row(
                each["problem"],
                each["method"],
                float(each["learning_rate"]),
                float(each["seconds"]),
                float(each["validation"]),
                tuple(map(float, each["scores"].split())),
                tuple(tuple(map(float, s.split("/"))) for s in each["metrics"].split()),
            )
            for each in csv.DictReader(file)
        ]


class Table:
    """The rows, by problem and method, and what is asked of them."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = {(row.problem, row.method): row for row in rows}
        self.problems = list(dict.fromkeys(row.problem for row in rows))

    def row(self, problem: str, method: str) -> Row:
        return self.rows[problem, method]

    def scores(self, problem: str, method: str) -> Array:
        """[seeds] of the test data; infinite where a run diverged."""
        found = np.array(self.rows[problem, method].scores)
        return np.where(np.isfinite(found), found, np.inf)

    def score(self, problem: str, method: str) -> float:
        return float(self.scores(problem, method).mean())

    def static(self, problem: str) -> Iterator[Row]:
        """Uniform and all other static weights, at the usual weight decay and b2."""
        for (of, method), row in self.rows.items():
            if of == problem and (method == UNIFORM or method.startswith("static, ")):
                yield row

    def best_static(self, problem: str) -> Row:
        """The static weights with the lowest score on validation data."""
        return min(self.static(problem), key=lambda row: row.validation)

    def best_uniform(self, problem: str) -> Row:
        """Uniform weights with the weight decay of the lowest score on validation data."""
        decays = [f"{UNIFORM}, weight decay {decay:g}" for decay in runs.WEIGHT_DECAYS]
        tried = (self.rows[problem, method] for method in (UNIFORM, *decays))
        return min(tried, key=lambda row: row.validation)

    def difference(
        self, problem: str, method: str, other: str = UNIFORM
    ) -> tuple[float, float, float]:
        """Mean of the scores' differences, seed by seed, and a 95 % bootstrap interval of it."""
        differences = self.scores(problem, method) - self.scores(problem, other)
        if not np.isfinite(differences).all():
            return np.inf, np.inf, np.inf
        low, high = np.quantile(differences[RESAMPLES].mean(axis=1), [0.025, 0.975])
        return float(differences.mean()), float(low), float(high)

    def beyond_noise(self, problem: str, method: str) -> int:
        """1 where the method is worse than uniform, -1 where it is better, 0 where neither is sure.

        Sure is what both the bootstrap interval and a paired t-test at 5 % say: of five seeds the
        bootstrap alone is too sure.
        """
        _, low, high = self.difference(problem, method)
        differences = self.scores(problem, method) - self.scores(problem, UNIFORM)
        if low <= 0 <= high or not np.isfinite(low):
            return int(low > 0)
        _, p_value = stats.ttest_1samp(differences, 0)
        certain = np.asarray(p_value) < LEVEL
        return int(np.sign(low)) if certain else 0

    def close_to_static(self, method: str) -> list[str]:
        """On which problems the method is within CLOSE percent of the best static weights."""
        return [
            p
            for p in self.problems
            if self.score(p, method) <= self.score(p, self.best_static(p).method) + CLOSE
        ]

    def ranks(self, methods: Sequence[str] = ONE_RUN, split: str = "test") -> dict[str, float]:
        """Mean rank over problems, 1 is best."""
        ranks = stats.rankdata(self.matrix(methods, split), axis=1).mean(axis=0)
        return dict(zip(methods, ranks.tolist(), strict=True))

    def matrix(self, methods: Sequence[str] = ONE_RUN, split: str = "test") -> Array:
        """Scores [problems, methods]; infinite where runs diverged."""
        pick = self.score if split == "test" else lambda p, m: self.row(p, m).validation
        found = np.array([[pick(p, m) for m in methods] for p in self.problems])
        return np.where(np.isfinite(found), found, np.inf)

    def beyond_front(self, problem: str, method: str, higher_is_better: Sequence[bool]) -> float:
        """By how many percent some static weights are better in EVERY metric; below 0 none are."""
        own = np.mean(self.row(problem, method).metrics, axis=0)
        others = [np.mean(r.metrics, axis=0) for r in self.static(problem) if r.method != method]
        return float(worse(own, np.array(others), higher_is_better).min(axis=1).max())
