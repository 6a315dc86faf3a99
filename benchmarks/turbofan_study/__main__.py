"""What really helps: ``python -m benchmarks.turbofan_study DIR --runs RUNS``.

Trains the compact model on all four subsets of C-MAPSS in DIR, five seeds, with every weighting and
with GABA changed one factor at a time. Finished runs are kept in RUNS, so it can be stopped and
started again; two processes may share RUNS if they take different subsets. ``--report-only`` takes
the cells that are complete. The results and pictures are written beside this script, and tables of
them into docs/turbofan_study.md.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tyro
from rich.progress import Progress

from benchmarks.turbofan_study import _page
from gaba_jax import weighting
from gaba_jax.turbofan import compare, config, report
from gaba_jax.turbofan.train import Subset, TrainConfig

HERE = Path(__file__).parent
SUBSETS: tuple[Subset, ...] = ("FD001", "FD002", "FD003", "FD004")
SEEDS = range(5)
CURED = "gaba:debias=true,warmup_steps=0"
METHODS = (
    "uniform",
    "gaba",
    CURED,
    "gaba:debias=true,warmup_steps=0,min_weight=0.0",
    "inverse_norm",
    "inverse_share",
)
OTHERS = (
    "gradnorm",
    "gradnorm:variant=published",
    "uncertainty",
    "dynamic_weight_average",
    "random",
)
PICTURED = ("uniform", "gaba", METHODS[3], "inverse_norm", "gaba + amnl", "gradnorm")
# From the published setting, one factor at a time; the start and the warm-up, two by two.
ABLATIONS = (
    "gaba:debias=true",
    "gaba:warmup_steps=0",
    "gaba:min_weight=0.0",
    "gaba:floor=project",
    "gaba:beta=0.9",
    "gaba:beta=0.999",
)
# The same three under another optimizer; SGD's rate was the best of five on validation engines.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "b2=0.999": {"adam_b2": 0.999},
    "SGD": {"optimizer": "sgd", "learning_rate": 1e-4},
}


def keep_uniform_norm(rule: weighting.Weighting) -> weighting.Weighting:
    """The rule's weights times what gives the combined gradient the norm under equal weights."""

    def update(stats: weighting.TaskStats, state: Any) -> tuple[Any, Any]:
        weights, state = rule.update(stats, state)
        unit = stats.norms / jnp.maximum(jnp.max(stats.norms), 1e-30)
        gram = stats.cosines * unit[:, None] * unit
        equal = jnp.full_like(weights, 1 / len(weights))
        ratio = (equal @ gram @ equal) / jnp.maximum(weights @ gram @ weights, 1e-30)
        return weights * jnp.sqrt(jnp.maximum(ratio, 0)), state

    return rule._replace(needs=rule.needs | {"norms", "cosines"}, update=update)


def cells(subset: Subset, data: Path) -> list[compare.Cell]:
    """All cells of a subset. The two large ones train on every second window."""
    stride = 2 if subset in ("FD002", "FD004") else 1
    base = TrainConfig(data=data, subset=subset, stride=stride)

    def cell(method: str, label: str = "", **changes: Any) -> compare.Cell:
        rule = config.parse_method(method)
        return compare.Cell(
            f"{method}, {label}" if label else method, rule, dataclasses.replace(base, **changes)
        )

    alone = weighting.constant(2, [1.0, 0.0])
    made = [cell(method) for method in (*METHODS, *ABLATIONS)]
    made.append(compare.Cell("RUL alone", alone._replace(needs=frozenset({"norms"})), base))
    made += [
        cell(method, label, **changes)
        for label, changes in OPTIMIZERS.items()
        for method in ("uniform", "gaba", CURED)
    ]
    for method in ("gaba", CURED):
        kept = keep_uniform_norm(config.parse_method(method))
        made.append(compare.Cell(f"{method}, norm kept", kept, base))
    made += [cell(method, loss="amnl") for method in ("uniform", "gaba")]
    made += [cell(method) for method in OTHERS]
    return made


def main(
    data: tyro.conf.Positional[Path],
    runs: Path,
    subset: tuple[Subset, ...] = SUBSETS,
    report_only: bool = False,
) -> None:
    """Runs what is missing, then reports.

    Args:
      data: folder with C-MAPSS.
      runs: folder for the runs.
      subset: those to run.
      report_only: run nothing; report the cells that are complete.
    """
    todo = [each for name in subset for each in cells(name, data)]
    if report_only:
        todo = [
            each
            for each in todo
            if all(compare.run_file(runs, each, seed).exists() for seed in SEEDS)
        ]
    with Progress() as progress:
        total = sum(compare.missing_epochs(todo, SEEDS, runs))
        bar = progress.add_task("", total=total)

        def on_epoch(cell: compare.Cell, epoch: int, count: int) -> None:
            name = f"{cell.config.subset} {cell.label}"
            progress.update(bar, advance=count, description=name)

        results = compare.run(todo, SEEDS, runs, on_epoch)
    if report_only or subset == SUBSETS:
        (HERE / "results.csv").write_text(report.results_csv(results))
        (HERE / "report.md").write_text(report.report(results))
        report.write_pictures([r for r in results if r["label"] in PICTURED], HERE)
        _page.write()


if __name__ == "__main__":
    tyro.cli(main)
