"""What a comparison says: a table, statistics and pictures from the results of its runs."""

import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from gaba_jax.plot import COLORS
from gaba_jax.turbofan.compare import BASELINE
from gaba_jax.turbofan.config import TASKS

Result = dict[str, Any]
METRICS = {
    "rmse": "test RMSE",
    "nasa_score": "NASA score",
    "health_accuracy": "health accuracy",
    "macro_f1": "macro F1",
}
LEVEL = 0.05
_RESAMPLES = 9999


def write(results: Sequence[Result], out: Path) -> None:
    """Writes ``results.csv``, ``report.md`` and the pictures of a comparison."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.csv").write_text(results_csv(results))
    (out / "report.md").write_text(report(results))
    write_pictures(results, out)


def write_pictures(results: Sequence[Result], out: Path) -> None:
    """Writes ``pareto_SUBSET.png`` and ``history_SUBSET.png``."""
    for subset in _unique(results, "subset"):
        of_subset = [r for r in results if r["subset"] == subset]
        pareto(of_subset).savefig(out / f"pareto_{subset}.png", dpi=130)
        history(of_subset).savefig(out / f"history_{subset}.png", dpi=130)


def results_csv(results: Sequence[Result]) -> str:
    """One line a run."""
    columns = ["subset", "loss", "method", "seed", "diverged", *METRICS]
    columns += [f"weight_{task}" for task in TASKS]
    columns += ["gradient_ratio", "contribution_ratio", "updates", "step_seconds"]
    columns += ["validation_rmse", "label"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in results:
        weights = {f"weight_{task}": w for task, w in result["task_weights"].items()}
        scores = result["test"] | {"validation_rmse": result["validation"].get("rmse")}
        writer.writerow(result | scores | weights)
    return text.getvalue()


def report(results: Sequence[Result]) -> str:
    """The whole report as Markdown."""
    labels, subsets = _unique(results, "label"), _unique(results, "subset")
    seeds = _unique(results, "seed")
    parts = [
        "# Comparison",
        f"{len(labels)} methods, {len(subsets)} subsets, {len(seeds)} seeds. Scores are of the "
        "test engines, mean ± standard deviation over the seeds.",
    ]
    for subset in subsets:
        parts += [f"## {subset}", table([r for r in results if r["subset"] == subset])]
    parts += ["## Statistics, test RMSE", *statistics(results)]
    return "\n\n".join(parts) + "\n"


def means(results: Sequence[Result]) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(subset, label, mean of each metric over the seeds and how many diverged)."""
    for subset, label in itertools.product(_unique(results, "subset"), _unique(results, "label")):
        runs = [r for r in results if (r["subset"], r["label"]) == (subset, label)]
        row = {
            metric: float(np.mean(_known([r["test"][metric] for r in runs if not r["diverged"]])))
            for metric in METRICS
        }
        if runs:
            yield subset, label, row | {"diverged": float(sum(r["diverged"] for r in runs))}


def table(results: Sequence[Result]) -> str:
    """The methods on one subset, as Markdown."""
    columns = [*METRICS.values(), *(f"weight, {task}" for task in TASKS)]
    columns += ["gradient ratio", "contribution ratio", "diverged"]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for label in _unique(results, "label"):
        runs = [r for r in results if r["label"] == label]
        whole = [r for r in runs if not r["diverged"]]
        cells = [
            _spread(
                [r["test"][metric] for r in whole], 1 if metric in ("rmse", "nasa_score") else 3
            )
            for metric in METRICS
        ]
        cells += [_spread([r["task_weights"][task] for r in whole], 3) for task in TASKS]
        cells += [
            _number(_median([r[name] for r in whole]), 1)
            for name in ("gradient_ratio", "contribution_ratio")
        ]
        cells.append(f"{len(runs) - len(whole)} of {len(runs)}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def statistics(results: Sequence[Result], metric: str = "rmse") -> list[str]:
    """Paragraphs and tables: Friedman, Nemenyi, and the paired bootstrap against uniform."""
    labels, subsets = _unique(results, "label"), _unique(results, "subset")
    scores = _scores(results, metric)  # [subsets, labels, seeds]
    parts = []
    diverged: NDArray[np.bool_] = np.any(np.isnan(scores), axis=(0, 2))
    if diverged.any():
        names = ", ".join(label for label, bad in zip(labels, diverged, strict=True) if bad)
        parts.append(f"Left out of the rank tests, for runs that diverged: {names}.")
    kept = scores[:, ~diverged]
    kept_labels = [label for label, bad in zip(labels, diverged, strict=True) if not bad]
    over_seeds = kept.mean(axis=2)
    blocks = np.concatenate(np.moveaxis(kept, 2, 1))  # [subsets x seeds, labels]
    parts.append(friedman(over_seeds, "seed means per subset"))
    parts.append(
        friedman(blocks, "subset x seed blocks, as published")
        + " Runs on one subset are not independent, so this one is too sure."
    )
    parts.append(nemenyi(over_seeds, kept_labels))
    for loss in _unique(results, "loss"):
        baseline = next(
            (r["label"] for r in results if r["method"] == BASELINE and r["loss"] == loss), None
        )
        if baseline is None:
            parts.append(f"No paired test for the loss {loss}: {BASELINE} was not run with it.")
            continue
        of_loss = [
            label
            for label in labels
            if label != baseline and any(r["label"] == label and r["loss"] == loss for r in results)
        ]
        rows = [
            (subset, label, scores[i, labels.index(label)] - scores[i, labels.index(baseline)])
            for i, subset in enumerate(subsets)
            for label in of_loss
        ]
        if rows:
            parts.append(paired(rows, baseline))
    return parts


def friedman(scores: NDArray[np.float64], blocks: str) -> str:
    """The Friedman test over blocks [blocks, methods], in words."""
    count, methods = scores.shape
    if count < 2 or methods < 3:
        return (
            f"Friedman ({blocks}): needs at least 2 blocks and 3 methods; there are {count} and "
            f"{methods}."
        )
    statistic, p = stats.friedmanchisquare(*scores.T)
    return f"Friedman ({blocks}): chi² = {statistic:.2f}, p = {p:.3g}, {count} blocks."


def nemenyi(scores: NDArray[np.float64], labels: Sequence[str], blocks: str = "subsets") -> str:
    """Average ranks (1 is best) over blocks and Nemenyi's critical difference."""
    count, methods = scores.shape
    if count < 2 or methods < 3:
        return f"Nemenyi: needs at least 2 {blocks} and 3 methods."
    ranks = stats.rankdata(scores, axis=1).mean(axis=0)
    quantile = stats.studentized_range.ppf(1 - LEVEL, methods, np.inf) / np.sqrt(2)
    difference = quantile * np.sqrt(methods * (methods + 1) / (6 * count))
    order = np.argsort(ranks)
    lines = ["| method | average rank |", "|---|---|"]
    lines += [f"| {labels[i]} | {ranks[i]:.2f} |" for i in order]
    return (
        f"Nemenyi: two methods differ at the {LEVEL:.0%} level if their average ranks over the "
        f"{count} {blocks} differ by more than {difference:.2f}.\n\n" + "\n".join(lines)
    )


def paired(rows: Sequence[tuple[str, str, NDArray[np.float64]]], baseline: str) -> str:
    """Differences to the baseline, seed by seed: bootstrap intervals, p after Holm, and power."""
    tested = [(subset, label, d[np.isfinite(d)]) for subset, label, d in rows]
    tested = [(subset, label, d) for subset, label, d in tested if len(d) >= 2]
    if not tested:
        return f"Paired bootstrap against {baseline}: needs at least 2 seeds."
    lines = [
        "| subset | method | difference | 95 % interval | p, Holm | seen with power 0.8 |",
        "|---|---|---|---|---|---|",
    ]
    intervals, p_values = [], []
    for _, _, differences in tested:
        drawn = stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        intervals.append(drawn.confidence_interval)
        below = float(np.mean(drawn.bootstrap_distribution <= 0))
        above = float(np.mean(drawn.bootstrap_distribution >= 0))
        p_values.append(min(1.0, 2 * max(min(below, above), 1 / (_RESAMPLES + 1))))
    for (subset, label, differences), interval, p in zip(
        tested, intervals, holm(p_values), strict=True
    ):
        lines.append(
            f"| {subset} | {label} | {differences.mean():+.2f} | "
            f"{interval.low:+.2f} to {interval.high:+.2f} | {p:.3g} | "
            f"{detectable(differences):.2f} |"
        )
    fewest = min(len(d) for _, _, d in tested)
    return (
        f"Paired bootstrap over seeds against {baseline} (negative is better), p corrected by Holm "
        f"over the {len(tested)} comparisons. With {fewest} seeds the bootstrap is optimistic: a "
        f"sign test could not go below p = {2 / 2**fewest:.3g}. The last column is the difference "
        "that so many seeds would find with power 0.8.\n\n" + "\n".join(lines)
    )


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Holm's step-down correction."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def detectable(differences: NDArray[np.float64], power: float = 0.8) -> float:
    """The mean difference that a paired t-test with this spread finds with the given power."""
    free = len(differences) - 1
    quantiles = stats.t.ppf(1 - LEVEL / 2, free) + stats.t.ppf(power, free)
    return float(quantiles * differences.std(ddof=1) / np.sqrt(len(differences)))


def pareto(results: Sequence[Result]) -> Figure:
    """The trade-off between the tasks: RMSE against health accuracy, up and to the left is better.

    Means with standard deviations. The front is joined: no method is better in both. A method whose
    RMSE is more than twice the median, or whose accuracy less than half of it, is named and not
    drawn.
    """
    means, spreads = {}, {}
    for label in _unique(results, "label"):
        scores = [r["test"] for r in results if r["label"] == label and not r["diverged"]]
        if scores:
            values = _array([[score["rmse"], score["health_accuracy"]] for score in scores])
            means[label], spreads[label] = values.mean(axis=0), values.std(axis=0)
    middle = np.nanmedian(_array(list(means.values()) or [[np.inf, 0]]), axis=0)
    figure = Figure(figsize=(8, max(4.2, 1 + 0.2 * len(means))), layout="constrained")
    axes = figure.subplots()
    points = []
    for i, (label, (x, y)) in enumerate(means.items()):
        color, marker = COLORS[i % len(COLORS)], "osD^v"[i // len(COLORS) % 5]
        inside = x <= 2 * middle[0] and y >= middle[1] / 2
        dx, dy = spreads[label]
        if inside:
            points.append((x, y))
        else:
            x, label = np.nan, f"{label} (far outside)"
        axes.errorbar(x, y, dy, dx, label=label, linewidth=1, color=color, marker=marker)
    front = [p for p in points if not any(q[0] < p[0] and q[1] > p[1] for q in points)]
    axes.plot(*np.array(sorted(front)).reshape(-1, 2).T, color="0.6", linewidth=1, zorder=0)
    axes.set(xlabel="RUL: test RMSE (cycles)", ylabel="health: test accuracy")
    axes.set_title(results[0]["subset"])
    axes.spines[["top", "right"]].set_visible(False)
    if points:
        figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def history(results: Sequence[Result]) -> Figure:
    """Health weight and gradient ratio over training: means, and bands from least to most."""
    labels = _unique(results, "label")
    figure = Figure(figsize=(11, max(4, 1 + 0.2 * len(labels))), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, label in enumerate(labels):
        runs = [r["history"] for r in results if r["label"] == label and not r["diverged"]]
        if not runs:
            continue
        color, line = COLORS[i % len(COLORS)], ("-", "--", ":")[i // len(COLORS) % 3]
        weights = _array([run["weights"] for run in runs])[..., TASKS.index("health")]
        ratios = _array([run["gradient_ratio"] for run in runs])
        for axes, values in ((left, weights), (right, ratios)):
            update = runs[0]["update"]
            axes.plot(update, values.mean(axis=0), line, color=color, linewidth=1.2, label=label)
            axes.fill_between(
                update, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0
            )
    if max((np.abs(line.get_ydata()).max() for line in left.lines), default=0) > 10:
        left.set_yscale("symlog", linthresh=1)  # weights that run away would hide the rest
    left.set(xlabel="update", ylabel="weight of the health loss")
    right.set(xlabel="update", ylabel="gradient norms, largest / smallest", yscale="log")
    figure.suptitle(results[0]["subset"])
    handles, names = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside right center", frameon=False, fontsize="small")
    return figure


def _unique(results: Sequence[Result], key: str) -> list[Any]:
    return list(dict.fromkeys(result[key] for result in results))


def _array(values: Any) -> NDArray[np.float64]:
    """With NaN for null."""
    return np.array(values, float)


def _scores(results: Sequence[Result], metric: str) -> NDArray[np.float64]:
    """[subsets, labels, seeds]; NaN where a run diverged."""
    axes = [_unique(results, key) for key in ("subset", "label", "seed")]
    found = {(r["subset"], r["label"], r["seed"]): r["test"].get(metric) for r in results}
    values = [found.get(key) for key in itertools.product(*axes)]
    return _array(values).reshape([len(axis) for axis in axes])


def _known(values: Sequence[float | None]) -> NDArray[np.float64]:
    """Without null, which stands for what is not finite; one NaN if nothing is left."""
    return _array([value for value in values if value is not None] or [np.nan])


def _median(values: Sequence[float | None]) -> float:
    return float(np.median(_known(values)))


def _number(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _spread(values: Sequence[float | None], digits: int) -> str:
    known = _known(values)
    if np.isnan(known).any():
        return "-"
    spread = f" ± {known.std(ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{spread}"
