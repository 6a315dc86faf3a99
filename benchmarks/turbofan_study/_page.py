"""Tables of results.csv for docs/turbofan_study.md."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.performance import replace_between

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "turbofan_study.md"
END = "<!-- end -->\n"
DEBIASED = "gaba:debias=true,warmup_steps=0,min_weight=0.0"
CURED = "gaba:debias=true,warmup_steps=0"
# What each table of the page shows: the methods on all subsets.
TABLES: dict[str, Sequence[str]] = {
    "summary": ("uniform", "gaba", DEBIASED, "inverse_share", "inverse_norm", "RUL alone"),
    "factors": (
        "gaba",
        "gaba:debias=true",
        "gaba:warmup_steps=0",
        CURED,
        DEBIASED,
        "gaba:min_weight=0.0",
        "gaba:floor=project",
        "gaba:beta=0.9",
        "gaba:beta=0.999",
        "gaba, norm kept",
        f"{CURED}, norm kept",
    ),
    "optimizers": [
        f"{method}{optimizer}"
        for optimizer in ("", ", b2=0.999", ", SGD")
        for method in ("uniform", "gaba", CURED)
    ],
    "methods": (
        "uniform",
        "gaba",
        "uniform + amnl",
        "gaba + amnl",
        "gradnorm",
        "gradnorm:variant=published",
        "uncertainty",
        "dynamic_weight_average",
        "random",
    ),
}


def rows() -> list[dict[str, str]]:
    """The runs."""
    with (HERE / "results.csv").open() as file:
        return list(csv.DictReader(file))


def table(labels: Sequence[str], runs: Sequence[dict[str, str]]) -> str:
    """Per subset: test RMSE, NASA score, health accuracy, and the RMSE of validation engines."""
    subsets = sorted({run["subset"] for run in runs})
    head = [f"{subset}: RMSE / NASA / health / validation RMSE" for subset in subsets]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    for label in labels:
        cells = []
        for subset in subsets:
            of_cell = [r for r in runs if (r["subset"], r["label"]) == (subset, label)]
            whole = [r for r in of_cell if r["diverged"] == "False"]
            if len(whole) < 2:
                cells.append(f"{len(of_cell) - len(whole)} of {len(of_cell)} diverged")
                continue

            def mean(column: str, whole: Sequence[dict[str, str]] = whole) -> float:
                return statistics.mean(float(run[column] or "inf") for run in whole)

            spread = statistics.stdev(float(run["rmse"]) for run in whole)
            health = "-" if label == "RUL alone" else f"{mean('health_accuracy'):.3f}"
            cells.append(
                f"{mean('rmse'):.2f} ± {spread:.2f} / {mean('nasa_score'):.4g} / {health} / "
                f"{mean('validation_rmse'):.2f}"
            )
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ratios(runs: Sequence[dict[str, str]]) -> str:
    """Largest gradient norm over the smallest, before and after weighting; medians over seeds."""
    subsets = sorted({run["subset"] for run in runs})
    lines = ["| | " + " | ".join(subsets) + " |", "|---|" + "---|" * len(subsets)]
    for label in ("uniform", "gaba", DEBIASED, "inverse_norm"):
        cells = []
        for subset in subsets:
            of_cell = [r for r in runs if (r["subset"], r["label"]) == (subset, label)]
            before, after = (
                statistics.median(float(run[column]) for run in of_cell)
                for column in ("gradient_ratio", "contribution_ratio")
            )
            cells.append(f"{before:.0f}x, {after:.1f}x")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def start(name: str) -> str:
    """The marker before a table."""
    return f"<!-- made by benchmarks.turbofan_study: {name} -->\n"


def tables() -> dict[str, str]:
    """Every table by its name."""
    runs = rows()
    made = {name: table(labels, runs) for name, labels in TABLES.items()}
    return made | {"ratios": ratios(runs)}


def write() -> None:
    """Writes every table where the page has its marker."""
    for name, text in tables().items():
        PAGE.write_text(replace_between(PAGE.read_text(), start(name), END, text))
