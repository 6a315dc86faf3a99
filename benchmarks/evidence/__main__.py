"""Which weighting to trust: ``python -m benchmarks.evidence DATA --runs RUNS``.

Twelve problems of eight fields, 14 weightings with a learning rate of their own, five seeds; two
hours of two cores. DATA holds ``cmapss`` (NASA's text) and ``tabular``. Finished runs are kept
in RUNS, so the study can be stopped and started again; two processes may share RUNS if they take
different problems (``--only``). When all are there, the five best methods are run with Adam's usual
second moment too, and results.csv, tuning.csv, the pictures and the tables of docs/evidence.md are
written from RUNS. ``--report-only`` trains nothing.
"""

import csv
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.evidence import _page, problems, runs, scores

BEST = 5  # methods that are run with Adam's usual second moment too


@dataclasses.dataclass
class Options:
    data: Annotated[Path, tyro.conf.Positional]
    """folder with ``cmapss`` and ``tabular``"""
    runs: Path
    """where finished runs are kept"""
    only: tuple[str, ...] = ()
    """names of problems; none given: all"""
    report_only: bool = False
    """make the tables of what is there"""


def main(options: Options) -> None:
    known = problems.problems(options.data)
    unknown = set(options.only) - set(known)
    if unknown:
        raise SystemExit(f"--only: no problem {sorted(unknown)}; there are {list(known)}.")
    made = {name: known[name]() for name in options.only or known}
    if not options.report_only:
        for name, problem in made.items():
            runs.run(name, problem, runs.cells(problem), options.runs)
    if options.only:
        return  # the tables are of all problems
    if not options.report_only:
        ranks = scores.Table(_rows(made, options.runs)[0]).ranks(split="validation")
        best = tuple(sorted(ranks, key=ranks.__getitem__)[:BEST])
        for name, problem in made.items():
            runs.run(name, problem, runs.cells(problem, long_b2=best), options.runs)
    rows, tuning = _rows(made, options.runs)
    scores.write_csv(_page.RESULTS, rows)
    _write(_page.TUNING, tuning)
    _write(
        _page.PROBLEMS,
        [{"problem": name, **_page.about(problem)} for name, problem in made.items()],
    )
    _page.write()


def _rows(
    made: dict[str, problems.Problem], kept: Path
) -> tuple[list[scores.Row], list[dict[str, Any]]]:
    selected = [scores.select(name, problem, kept) for name, problem in made.items()]
    return [r for rows, _ in selected for r in rows], [t for _, found in selected for t in found]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
