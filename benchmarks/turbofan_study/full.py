"""The published experiment: ``python -m benchmarks.turbofan_study.full DATA --runs RUNS``.

Trains with ``gaba-jax train``: the published network on FD001 with each of METHODS, which takes
about 80 minutes of two cores, and for the gradient ratio under equal weights both networks on all
subsets. A run that is stopped goes on where it was. Writes full.json and full_ratio.png beside this
script, and the tables of docs/published_experiment.md.

The protocol with all its epochs, seeds and methods, for a machine with a GPU:
``--epochs 500 --seeds 5 --methods all --subsets FD001 FD002 FD003 FD004``.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro

from benchmarks import _measure
from benchmarks.performance import replace_between, row
from benchmarks.turbofan_study import _page
from gaba_jax import cli
from gaba_jax.monitor import task_metrics
from gaba_jax.turbofan.config import Subset

HERE = Path(__file__).parent
RESULT = HERE / "full.json"
PICTURE = HERE / "full_ratio.png"
PAGE = HERE.parent.parent / "docs" / "published_experiment.md"
END = "<!-- end -->\n"
SUBSETS: tuple[Subset, ...] = ("FD001", "FD002", "FD003", "FD004")
DEBIASED = "gaba, debiased"
# "stacked" is exact and faster with two tasks; uniform weights need the norms only to be watched.
STACKED = ("--measure", "stacked")
METHODS: dict[str, tuple[str, ...]] = {
    "uniform": ("--weighting", "uniform", "--every", "10"),
    "gaba": ("--weighting", "gaba", *STACKED),
    DEBIASED: (
        *("--weighting", "gaba", *STACKED),
        *("--debias", "--warmup-steps", "0", "--min-weight", "0"),
    ),
}
OTHERS: dict[str, tuple[str, ...]] = {
    "GRACE": ("--weighting", "gaba", "--loss", "amnl", *STACKED),
    "AMNL": ("--weighting", "uniform", "--loss", "amnl", "--every", "10"),
    "GradNorm": ("--weighting", "gradnorm", *STACKED),
    "DWA": ("--weighting", "dynamic_weight_average", "--every", "10"),
    "uncertainty": ("--weighting", "uncertainty", "--every", "10"),
    "PCGrad": ("--weighting", "pcgrad", *STACKED),
    "CAGrad": ("--weighting", "cagrad", *STACKED),
}
PROTOCOL: dict[str, Any] = {
    "model": "full",
    "batch-size": 64,
    "optimizer": "adamw",
    "learning-rate": 1e-3,
    "adam-b2": 0.999,
    "clip-norm": 1.0,
    "dropout": 0.5,
    "average-decay": 0.99,
    "early-stopping": 50,
}
# A short run takes the learning rate to zero within its epochs; a long one is the published.
SHORT: dict[str, Any] = {"schedule": "cosine", "warmup-epochs": 1}
LONG: dict[str, Any] = {"schedule": "plateau", "warmup-epochs": 10}


class Figures(NamedTuple):
    """Published RMSE and NASA score of the test engines, each with its spread."""

    rmse: float
    rmse_spread: float
    nasa: float
    nasa_spread: float


PUBLISHED: dict[str, dict[str, Figures]] = {
    "FD002": {
        "GradNorm": Figures(8.19, 0.78, 260.9, 36.1),
        "GABA": Figures(7.53, 0.65, 224.2, 22.4),
        "GRACE": Figures(7.72, 0.66, 223.4, 26.5),
    },
    "FD004": {
        "GradNorm": Figures(7.74, 0.59, 222.9, 18.6),
        "GABA": Figures(8.25, 1.10, 247.2, 60.3),
        "GRACE": Figures(8.12, 0.70, 242.0, 25.6),
    },
}
# Of both subsets, as printed: RMSE and NASA score.
PUBLISHED_AVERAGE: dict[str, tuple[float, float]] = {
    "GradNorm": (7.96, 241.9),
    "GABA": (7.89, 235.7),
    "GRACE": (7.92, 232.7),
}
# FD001, RMSE and NASA score. From an earlier report, source not checked.
EARLIER: dict[str, tuple[float, float]] = {
    "uniform": (10.08, 143.2),
    "GABA": (9.63, 130.4),
    "GradNorm": (9.38, 127.6),
    "GRACE": (9.14, 121.4),
    "uncertainty": (9.15, 115.4),
    "AMNL": (10.43, 434.4),
    "DWA": (10.58, 146.1),
}
# Name in the publication, of our runs of the full network, and of the study's of the compact one.
NAMES = [
    ("uniform", "uniform", "uniform"),
    ("GABA", "gaba", "gaba"),
    ("", DEBIASED, _page.DEBIASED),
    ("GradNorm", "GradNorm", "gradnorm"),
    ("GRACE", "GRACE", "gaba + amnl"),
    ("uncertainty", "uncertainty", "uncertainty"),
    ("AMNL", "AMNL", "uniform + amnl"),
    ("DWA", "DWA", "dynamic_weight_average"),
]
TEST_ENGINES = {"FD001": 100, "FD002": 259, "FD004": 248}
EVALUATIONS = {
    "test": "last window, capped",
    "test_uncapped": "last window, uncapped",
    "test_all_windows": "all windows, capped",
    "test_all_windows_uncapped": "all windows, uncapped",
}


def folder(runs: Path, name: str, subset: str, seed: int) -> Path:
    """Where a run is kept."""
    return runs / subset / name.replace(", ", "-") / f"seed{seed}"


Made = tuple[dict[str, Any], np.ndarray]  # a run's summary, and its norms at every update


def train(
    data: Path, out: Path, subset: str, options: dict[str, Any], flags: Sequence[str]
) -> Made:
    """Runs ``gaba-jax train``, or what is left of it, and returns what it wrote."""
    if (out / "summary.json").exists():
        kept = json.loads((out / "summary.json").read_text())["config"]
        changed = [name for name in options if kept[name.replace("-", "_")] != options[name]]
        if changed:
            raise SystemExit(
                f"{out} holds a run with another {', '.join(changed)}: name another folder of runs."
            )
    else:
        named = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        where = ("--data", str(data), "--subset", subset, "--out", str(out))
        keep = ("--checkpoint-every", "200", "--resume")
        if status := cli.main(["train", *where, *keep, *named, *flags]):
            raise SystemExit(status)
    with np.load(out / "history.npz") as history:
        norms = history["task_norms"]
    return json.loads((out / "summary.json").read_text()), norms


def ratio_curve(norms: np.ndarray, epochs: int, parts: int = 4) -> dict[str, list[float]]:
    """Median gradient ratio in each of ``parts`` parts of an epoch, and its largest over all."""
    ratio = np.asarray(task_metrics(np.ones_like(norms), norms)["gradient_ratio"])
    chunks = np.array_split(ratio, epochs * parts)
    return {
        "epoch": [(i + 0.5) / parts for i in range(len(chunks))],
        "median": [float(np.median(chunk)) for chunk in chunks],
        "largest": [float(chunk.max()) for chunk in chunks],
    }


def describe(summary: dict[str, Any], norms: np.ndarray) -> dict[str, Any]:
    kept = ("updates", "epochs", "ended", "evaluated_epoch", "parameters", "windows", "timing")
    return {
        **{name: summary[name] for name in kept},
        "configuration": {k: v for k, v in summary["config"].items() if k != "data"},
        "task_weights": summary["task_weights"],
        "gradient_ratio": summary["gradient_ratio"],
        "contribution_ratio": summary["contribution_ratio"],
        "validation": summary["validation"],
        **{name: summary[name] for name in EVALUATIONS},
        "ratio": ratio_curve(norms, summary["epochs"]),
    }


def gaussian_nasa_score(rmse: float, engines: int) -> float:
    r"""NASA score that N engines have in the mean if their errors are normal with that RMSE.

    .. math:: N (e^{a^2 / 2} \Phi(a) + e^{b^2 / 2} \Phi(b) - 1), \quad a = s / 10, b = s / 13
    """

    def half(sigma: float) -> float:
        return math.exp(sigma**2 / 2) * statistics.NormalDist().cdf(sigma)

    return engines * (half(rmse / 10) + half(rmse / 13) - 1)


def both(rmse: float, nasa: float) -> str:
    """A cell: RMSE / NASA score."""
    return f"{rmse:.2f} / {nasa:.4g}"


def mean_of(runs: Sequence[dict[str, Any]], split: str) -> tuple[float, float]:
    rmse, nasa = (
        statistics.mean(run[split][key] for run in runs) for key in ("rmse", "nasa_score")
    )
    return rmse, nasa


def results_table(document: dict[str, Any]) -> str:
    """Our runs, evaluated four ways."""
    head = ("", "epoch", "validation", *EVALUATIONS.values(), "health accuracy")
    lines = [row(*head), "|---|" + "---|" * (len(head) - 1)]
    full = {f"full, {s}, {m}": r for s, of in document["runs"].items() for m, r in of.items()}
    compact = {f"compact, {s}, uniform": [run] for s, run in document["compact"].items()}
    for name, runs in (full | compact).items():
        epochs = statistics.mean(run["evaluated_epoch"] for run in runs)
        accuracy = statistics.mean(run["test"]["health_accuracy"] for run in runs)
        scores = [both(*mean_of(runs, split)) for split in EVALUATIONS]
        validation = f"{mean_of(runs, 'validation')[0]:.2f}"
        lines.append(row(name, f"{epochs:.0f}", validation, *scores, f"{accuracy:.2f}"))
    return "\n".join(lines) + "\n"


def whole_table() -> str:
    """The published table, with its spreads."""
    columns = [f"{subset}, {score}" for subset in PUBLISHED for score in ("RMSE", "NASA score")]
    head = ("", *columns, "average, RMSE", "average, NASA score")
    lines = [row(*head), "|---|" + "---|" * (len(head) - 1)]
    for method, (rmse, nasa) in PUBLISHED_AVERAGE.items():
        cells = []
        for methods in PUBLISHED.values():
            found = methods[method]
            cells.append(f"{found.rmse:.2f} ± {found.rmse_spread:.2f}")
            cells.append(f"{found.nasa:.1f} ± {found.nasa_spread:.1f}")
        lines.append(row(method, *cells, f"{rmse:.2f}", f"{nasa:.1f}"))
    return "\n".join(lines) + "\n"


def beside_table(document: dict[str, Any]) -> str:
    """Published figures, the full network, the compact one of the study; last windows, capped."""
    head = ["", "FD001, earlier report", "FD001, full"]
    for subset in SUBSETS:
        head += [f"{subset}, published"] if subset in PUBLISHED else []
        head.append(f"{subset}, compact")
    lines = [row(*head), "|---|" + "---|" * (len(head) - 1)]
    study = _page.rows()
    for published, full, compact in NAMES:
        runs = document["runs"]["FD001"].get(full)
        cells = [
            both(*EARLIER[published]) if published in EARLIER else "",
            both(*mean_of(runs, "test")) if runs else "",
        ]
        for subset in SUBSETS:
            if subset in PUBLISHED:
                found = PUBLISHED[subset].get(published)
                cells.append(both(found.rmse, found.nasa) if found else "")
            kept = [r for r in study if (r["subset"], r["label"]) == (subset, compact)]
            rmse, nasa = (
                statistics.mean(float(r[key]) for r in kept) for key in ("rmse", "nasa_score")
            )
            cells.append(both(rmse, nasa))
        lines.append(row(published or full, *cells))
    return "\n".join(lines) + "\n"


def published_table() -> str:
    """The published scores, and those that normal errors of the published RMSE would have."""
    head = ("", "RMSE", "NASA score", "NASA score of normal errors")
    lines = [row(*head), "|---|---|---|---|"]
    listed = [
        (subset, method, found.rmse, found.nasa)
        for subset, methods in PUBLISHED.items()
        for method, found in methods.items()
    ]
    listed += [("FD001", f"{name}, earlier report", *scores) for name, scores in EARLIER.items()]
    for subset, method, rmse, nasa in listed:
        normal = gaussian_nasa_score(rmse, TEST_ENGINES[subset])
        lines.append(row(f"{subset}, {method}", f"{rmse:.2f}", f"{nasa:.1f}", f"{normal:.1f}"))
    return "\n".join(lines) + "\n"


def ratio_table(document: dict[str, Any]) -> str:
    """Start, largest and end of the gradient ratio under equal weights."""
    head = ("uniform weights", "first quarter of an epoch", "highest quarter", "last quarter")
    lines = [row(*head), "|---|---|---|---|"]
    for model, subsets in document["ratios"].items():
        for subset, found in subsets.items():
            median = found["median"]
            top = int(np.argmax(median))
            highest = f"{median[top]:.0f}, in epoch {int(found['epoch'][top]) + 1}"
            lines.append(
                row(f"{model}, {subset}", f"{median[0]:.0f}", highest, f"{median[-1]:.0f}")
            )
    return "\n".join(lines) + "\n"


def picture(document: dict[str, Any]) -> None:
    """Gradient ratio over the epochs, both networks, all subsets."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (model, subsets) in zip(axes, document["ratios"].items(), strict=True):
        for subset, found in subsets.items():
            axis.plot(found["epoch"], found["median"], label=subset)
        axis.set(title=f"{model} network", xlabel="epoch", yscale="log")
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("gradient norm of RUL / of health")
    axes[0].legend()
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


def tables(document: dict[str, Any]) -> dict[str, str]:
    """What stands after each marker of the page."""
    made = {
        "whole": whole_table(),
        "beside": beside_table(document),
        "results": results_table(document),
        "published": published_table(),
        "ratios": ratio_table(document),
    }
    return {f"<!-- made by benchmarks.turbofan_study.full: {k} -->\n": v for k, v in made.items()}


def main(
    data: tyro.conf.Positional[Path],
    runs: Path,
    epochs: int = 12,
    seeds: int = 1,
    methods: Literal["three", "all"] = "three",
    subsets: tuple[Subset, ...] = ("FD001",),
) -> None:
    """Runs what is missing, then writes.

    Args:
      data: folder with C-MAPSS.
      runs: folder for the runs.
      epochs: of the full network; more than 50 take the published schedule.
      seeds: runs per method.
      methods: three, or all that exist of the published comparison.
      subsets: of the full network.
    """
    options = PROTOCOL | (LONG if epochs > 50 else SHORT) | {"epochs": epochs}
    chosen = METHODS if methods == "three" else METHODS | OTHERS
    document: dict[str, Any] = {"runs": {}, "compact": {}, "ratios": {"compact": {}, "full": {}}}
    for subset in subsets:
        of_subset = document["runs"].setdefault(subset, {})
        for method, flags in chosen.items():
            of_subset[method] = [
                describe(
                    *train(
                        data,
                        folder(runs, method, subset, seed),
                        subset,
                        options | {"seed": seed},
                        flags,
                    )
                )
                for seed in range(seeds)
            ]
    for subset in SUBSETS:
        flags, stride = METHODS["uniform"], 1 if subset in ("FD001", "FD003") else 2
        made = train(
            data,
            folder(runs, "ratio-compact", subset, 0),
            subset,
            {"epochs": 15, "stride": stride},
            flags,
        )
        document["compact"][subset] = describe(*made)
        document["ratios"]["compact"][subset] = document["compact"][subset].pop("ratio")
        if subset in subsets:
            document["ratios"]["full"][subset] = document["runs"][subset]["uniform"][0]["ratio"]
            continue
        short = options | {"stride": 16, "epochs": 4}
        every_update = ("--weighting", "uniform", *STACKED)
        _, norms = train(data, folder(runs, "ratio-full", subset, 0), subset, short, every_update)
        document["ratios"]["full"][subset] = ratio_curve(norms, 4)
    _measure.write(RESULT, document)
    picture(document)
    page = PAGE.read_text()
    for start, text in tables(document).items():
        page = replace_between(page, start, END, text)
    PAGE.write_text(page)


if __name__ == "__main__":
    tyro.cli(main)
