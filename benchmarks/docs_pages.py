"""Tables of docs/benchmarks.md, choose_a_path.md and published_experiment.md, from their JSON.

``python -m benchmarks.docs_pages`` writes them between the markers of the pages; measures nothing.
"""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.performance import read, replace_between, row, which

DOCS = Path(__file__).parent.parent / "docs"
END = "<!-- end -->\n"
LAYOUTS = {"data parallel": "data parallel", "fsdp": "FSDP"}
NUM_TASKS = ("2", "8")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join([row(*head), "|---|" + "---|" * (len(head) - 1), *(row(*r) for r in rows)])


def where(document: dict[str, Any]) -> str:
    return f"{document['machine']}; jax {document['versions']['jax']}.\n\n"


def moved() -> str:
    """Collectives of a step, and what they move."""
    document = read("lowering")
    columns = [(k, layout) for k in NUM_TASKS for layout in LAYOUTS]
    rows = []
    for path in document["compiled"][NUM_TASKS[0]]["data parallel"]:
        cells = []
        for k, layout in columns:
            compiled = document["compiled"][k]
            step = compiled[layout][path]
            count = sum(part["executions"] for part in step.values() if isinstance(part, dict))
            cells.append(f"{count}, {step['bytes'] / compiled['gradient_bytes']:.2f}")
        rows.append((path, *cells))
    head = ("", *(f"{LAYOUTS[layout]}, K = {k}" for k, layout in columns))
    return where(document) + table(head, rows) + "\n"


def ghost() -> str:
    """Errors of ghost norms."""
    document, errors = read("ghost"), ("direct", "ghost", "ghost to direct")
    rows = [
        (
            case,
            f"{result['cancellation']:.3g}",
            *(f"{result[key]:.1e}" if result[key] else "0" for key in errors),
        )
        for case, result in document["results"].items()
    ]
    head = ("case", "cancellation", *errors)
    return where(document) + table(head, rows) + "\n"


def import_time() -> str:
    """Of a fresh interpreter."""
    document = read("import_time")
    seconds = [(f"`import {name}`", f"{t:.2f}") for name, t in document["seconds"].items()]
    rows = [*seconds, ("difference of the two", f"{document['difference']:.2f}")]
    return where(document) + table(("", "seconds"), rows) + "\n"


def loops() -> str:
    """Rules in simulated loops."""
    document = read("controller")
    rows = []
    for name, loop in document["loops"].items():
        pulls, reached = loop["contributions"], loop["updates_until_balanced"]
        rows.append(
            (
                name,
                f"{max(pulls) / min(pulls):.0f}x",
                "never" if reached is None else str(reached),
                f"{loop['noise_of_contributions']:.2f}",
                f"{loop['weight_of_the_finished']:.2f}",
                f"{loop['left_of_the_others']:.2g}",
            )
        )
    head = ("rule", "apart at rest", "balanced after", "noise", "weight of the finished", "left")
    return where(document) + table(head, rows) + "\n"


def digits() -> str:
    """The same rules on a real network."""
    document = read("controller")
    scales = document["settings"]["scales"]
    rows = []
    for name, result in document["digits"].items():
        cells = [name]
        for scale in scales:
            means = [100 * statistics.mean(seed) for seed in result["accuracies"][scale]]
            cells.append(f"{statistics.mean(means):.1f} ± {statistics.stdev(means):.1f}")
            cells.append(f"{statistics.mean(result['departures'][scale]):.2f}")
        rows.append(tuple(cells))
    named = {"equal": "equal scales", "apart": "scales apart"}
    head = ("rule", *(text for s in scales for text in (f"{named[s]}, accuracy", "imbalance")))
    return where(document) + table(head, rows) + "\n"


def full_model() -> str:
    """Training steps of the published network."""
    document = read("full_model")
    rows = [
        (
            name,
            f"{result['milliseconds']:.0f}",
            f"{result['times_plain']:.2f}",
            f"{document['over_peer'][name]:.2f}",
        )
        for name, result in document["results"].items()
    ]
    head = ("", "ms", "time / plain", "times faster than published")
    return where(document) + table(head, rows) + "\n"


def tables() -> dict[str, dict[str, str]]:
    """What stands after each marker, by page."""
    return {
        "choose_a_path.md": {start("which"): which()},
        "published_experiment.md": {start("full_model"): full_model()},
        "benchmarks.md": {
            start(part.__name__): part() for part in (moved, ghost, import_time, loops, digits)
        },
    }


def start(name: str) -> str:
    return f"<!-- made by benchmarks.docs_pages: {name} -->\n"


def main() -> None:
    for name, parts in tables().items():
        page = DOCS / name
        for marker, text in parts.items():
            page.write_text(replace_between(page.read_text(), marker, END, text))


if __name__ == "__main__":
    main()
