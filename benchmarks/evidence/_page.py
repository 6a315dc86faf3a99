"""docs/evidence.md and its picture, from results.csv."""

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence import runs
from benchmarks.evidence.problems import Problem
from benchmarks.evidence.scores import CLOSE, ONE_RUN, UNIFORM, Row, Table, read_csv
from benchmarks.performance import replace_between
from gaba_jax.plot import COLORS
from gaba_jax.turbofan import report

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE, README = ROOT / "docs" / "evidence.md", ROOT / "README.md"
PICTURE = ROOT / "docs" / "images" / "evidence.png"
RESULTS, TUNING, PROBLEMS = (HERE / f"{name}.csv" for name in ("results", "tuning", "problems"))
END = "<!-- end -->\n"
OURS = "equalize"
DRAWN = (UNIFORM, OURS, "gaba", "inverse_norm", "uncertainty", "upgrad")
FAR = 100.0  # percent: scores beyond are drawn at the border


def start(name: str) -> str:
    """The marker before a table."""
    return f"<!-- made by benchmarks.evidence: {name} -->\n"


def about(problem: Problem) -> dict[str, str]:
    """A line of problems.csv."""
    return {
        "field": problem.field,
        "tasks": "|".join(problem.tasks),
        "metrics": "|".join(problem.metrics),
        "higher_is_better": "|".join(str(int(each)) for each in problem.higher_is_better),
        "steps": str(problem.steps),
    }


def read_problems() -> dict[str, dict[str, Any]]:
    """problems.csv by name, its lists split."""
    with PROBLEMS.open() as file:
        return {
            line.pop("problem"): line
            | {key: line[key].split("|") for key in ("tasks", "metrics")}
            | {"higher_is_better": [each == "1" for each in line["higher_is_better"].split("|")]}
            for line in csv.DictReader(file)
        }


def lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    every = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in every)


def signed(value: float) -> str:
    return f"{value:+.1f}" if np.isfinite(value) else "diverged"


def difference(table: Table, problem: str, method: str) -> str:
    """From uniform, with its interval; bold where it is beyond the noise."""
    mean, low, high = table.difference(problem, method)
    if not np.isfinite(mean):
        return "diverged"
    text = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if table.beyond_noise(problem, method) else text


def answer(table: Table) -> str:
    """What the README says too."""
    ranks, count = table.ranks(), len(table.problems)
    order = sorted(ranks, key=ranks.__getitem__)
    sure = {p: table.beyond_noise(p, OURS) for p in table.problems}
    helped, harmed = ([p for p, v in sure.items() if v == side] for side in (-1, 1))
    close = len(table.close_to_static(OURS))
    return (
        f"On {count} problems, each method with a learning rate of its own, `{OURS}` is better "
        f"than uniform weights beyond the noise on {len(helped)} ({_listed(helped)}) and worse on "
        f"{len(harmed)} ({_listed(harmed)}).\n"
        f"It comes within {CLOSE:g} % of the best of all tuned static weights on {close}. "
        f"Its mean rank is {ranks[OURS]:.1f}, number {order.index(OURS) + 1} of {len(order)}; the "
        f"first is {order[0]} with {ranks[order[0]]:.1f}, and uniform weights have "
        f"{ranks[UNIFORM]:.1f}.\n"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def methods(table: Table) -> str:
    """A line a method: rank, against uniform, against static weights, the front, cost."""
    known, ranks = read_problems(), table.ranks()
    count, body = len(table.problems), []
    for method in sorted(ranks, key=ranks.__getitem__):
        sure = [table.beyond_noise(p, method) for p in table.problems]
        differences = [table.difference(p, method)[0] for p in table.problems]
        seconds = [
            table.row(p, method).seconds / table.row(p, UNIFORM).seconds for p in table.problems
        ]
        beyond = [
            table.beyond_front(p, method, known[p]["higher_is_better"]) <= CLOSE
            for p in table.problems
        ]
        body.append(
            [
                method,
                f"{ranks[method]:.1f}",
                f"{sure.count(-1)} / {sure.count(1)}",
                signed(float(np.median(differences))),
                signed(max(differences)),
                f"{len(table.close_to_static(method))} of {count}",
                f"{sum(beyond)} of {count}",
                f"{np.median(seconds):.1f}",
            ]
        )
    head = [
        "method",
        "mean rank",
        "better / worse than uniform",
        "median difference, %",
        "worst difference, %",
        f"within {CLOSE:g} % of the best static weights",
        f"within {CLOSE:g} % of their front",
        "time / uniform",
    ]
    return lines(head, body)


def by_problem(table: Table) -> str:
    """A line a problem: uniform, the best static weights, and ours."""
    known, body = read_problems(), []
    for problem in table.problems:
        best = table.best_static(problem)
        first = min(ONE_RUN, key=lambda method: table.score(problem, method))
        static = sum(1 for _ in table.static(problem))
        weights = best.method.removeprefix("static, ")
        body.append(
            [
                f"{problem} ({known[problem]['field']})",
                str(len(known[problem]["tasks"])),
                signed(table.score(problem, UNIFORM)),
                signed(table.score(problem, table.best_uniform(problem).method)),
                f"{signed(table.score(problem, best.method))}, {weights}",
                str(static * len(runs.RATES)),
                signed(table.score(problem, OURS)),
                difference(table, problem, OURS),
                f"{signed(table.score(problem, first))}, {first}",
            ]
        )
    head = [
        "problem",
        "losses",
        "uniform",
        "uniform, tuned decay",
        "best static weights",
        "runs to find them",
        OURS,
        f"{OURS} - uniform",
        "best method",
    ]
    return lines(head, body)


def everything(table: Table, methods: Sequence[str]) -> str:
    """Scores of methods on all problems."""
    body = [[m, *(signed(table.score(p, m)) for p in table.problems)] for m in methods]
    return lines(["", *table.problems], body)


def long_b2(table: Table) -> str:
    """The methods that were run with both decays of Adam's second moment."""
    names = dict.fromkeys(m for _, m in table.rows if m.endswith("b2=.999"))
    both = [m for name in names for m in (name.removesuffix(", b2=.999"), name)]
    return everything(table, both)


def ranks(table: Table) -> str:
    """Friedman and Nemenyi over problems."""
    matrix, blocks = table.matrix(), "problems"
    nemenyi = report.nemenyi(matrix, ONE_RUN, blocks)
    return f"{report.friedman(matrix, blocks)}\n\n{nemenyi}\n"


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Every table by its name."""
    table = Table(rows)
    return {
        "answer": answer(table),
        "methods": methods(table),
        "by problem": by_problem(table),
        "all": everything(table, ONE_RUN),
        "variants": everything(table, (UNIFORM, OURS, *runs.VARIANTS)),
        "b2": long_b2(table),
        "ranks": ranks(table),
    }


def write() -> None:
    """Every table where a page has its marker, and the picture."""
    rows = read_csv(RESULTS)
    for page, (name, text) in itertools.product((PAGE, README), tables(rows).items()):
        if start(name) in page.read_text():
            page.write_text(replace_between(page.read_text(), start(name), END, text))
    picture(Table(rows)).savefig(PICTURE, dpi=110)


def picture(table: Table) -> Figure:
    """A panel a problem: the front of static weights, and the methods."""
    known = read_problems()
    figure = Figure(figsize=(13, 3.2 * -(-len(table.problems) // 3)), layout="constrained")
    panels = np.ravel(figure.subplots(-(-len(table.problems) // 3), 3))
    for axes, problem in zip(panels, table.problems, strict=False):
        axes.set_title(problem, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        if len(known[problem]["metrics"]) == 2:
            _two_metrics(axes, table, problem, known[problem]["metrics"])
        else:
            _scores(axes, table, problem)
    for axes in panels[len(table.problems) :]:
        axes.set_axis_off()
    handles = {}
    for axes in panels:
        found, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    figure.legend(
        handles.values(), handles, loc="outside lower center", frameon=False, ncols=len(handles)
    )
    return figure


def _two_metrics(axes: Axes, table: Table, problem: str, names: Sequence[str]) -> None:
    static = np.array([np.mean(row.metrics, axis=0) for row in table.static(problem)])
    axes.plot(*static.T, ".", color="0.7", label="static weights")
    for i, method in enumerate(DRAWN):
        seeds = np.array(table.row(problem, method).metrics)
        (x, y), (dx, dy) = seeds.mean(axis=0), seeds.std(axis=0, ddof=1)
        axes.errorbar(x, y, dy, dx, color=COLORS[i], marker="o", linewidth=1, label=method)
    axes.set(xlabel=names[0], ylabel=names[1])


def _scores(axes: Axes, table: Table, problem: str) -> None:
    static = np.array([table.score(problem, row.method) for row in table.static(problem)])
    axes.plot(np.clip(static, None, FAR), np.zeros_like(static), "|", color="0.5", markersize=12)
    for i, method in enumerate(DRAWN):
        seeds = table.scores(problem, method)
        drawn = np.clip([*seeds, seeds.mean()], None, FAR)
        axes.plot(drawn[:-1], np.full(len(seeds), i + 1), ".", color=COLORS[i])
        axes.plot(drawn[-1], i + 1, "o", color=COLORS[i], label=method)
    axes.set(yticks=[], xlabel=f"worse than the baseline, % (at most {FAR:g} is drawn)")
