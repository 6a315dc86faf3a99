"""Tables of docs/benchmarks.md, choose_a_path.md and published_experiment.md, from their JSON.

``python -m benchmarks.docs_pages`` writes them between the markers of the pages; measures nothing.
"""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.performance import MODELS, read, replace_between, row

DOCS = Path(__file__).parent.parent / "docs"
END = "<!-- end -->\n"
LAYOUTS = {"data parallel": "data parallel", "fsdp": "FSDP"}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join([row(*head), "|---|" + "---|" * (len(head) - 1), *(row(*r) for r in rows)])


def where(document: dict[str, Any]) -> str:
    return f"{document['machine']}; jax {document['versions']['jax']}.\n\n"


def moved() -> str:
    """Collectives of a step, and what they move."""
    document = read("lowering")
    columns = [(k, layout) for k in document["compiled"] for layout in LAYOUTS]
    rows = []
    for path in next(iter(document["compiled"].values()))["data parallel"]:
        cells = []
        for k, layout in columns:
            compiled = document["compiled"][k]
            step = compiled[layout][path]
            count = sum(part["executions"] for part in step.values() if isinstance(part, dict))
            cells.append(f"{count}, {step['bytes'] / compiled['gradient_bytes']:.2f}")
        rows.append((path, *cells))
    head = ("", *(f"{LAYOUTS[layout]}, K = {k}" for k, layout in columns))
    return where(document) + table(head, rows) + "\n"


def cancellation() -> str:
    """Errors of exact norms."""
    document, errors = read("cancellation"), ("direct", "exact", "allowed")
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


def goals() -> str:
    """What a step may cost, and what it does."""
    document = read("overhead")
    rows = [
        (what, f"{goal['goal']:g}", f"{goal['measured']:.2f}", "yes" if goal["met"] else "no")
        for what, goal in document["goals"].items()
    ]
    return where(document) + table(("", "at most", "measured", "met"), rows) + "\n"


def peers() -> str:
    """Steps of PyTorch and TorchJD."""
    document = read("peers")
    versions, results = document["versions"], document["results"]
    rows = []
    for path in next(iter(results.values())):
        times = [
            f"{of[path]['milliseconds']:.1f} ms, {of[path]['times_exact']:.2f}x"
            for of in results.values()
        ]
        rows.append((path, *times))
    plain = " and ".join(
        f"{of['torch plain']['milliseconds'] / of['plain']['milliseconds']:.2f}x ours on the "
        f"{MODELS[name]}"
        for name, of in results.items()
    )
    return (
        f"{document['machine']}; jax {versions['jax']}, PyTorch {versions['torch'].split('+')[0]} "
        f"eager, TorchJD {versions['torchjd']}.\nA plain step takes PyTorch {plain}.\n\n"
        + table(("", *(MODELS[name] for name in results)), rows)
        + "\n"
    )


def growth() -> str:
    """With the number of tasks, and of parameters."""
    document = read("scaling")
    fitted, largest = document["exponents"]["num_tasks"], document["results"]["num_tasks"][-1]
    tasks = ", ".join(f"{path} K^{fitted[path]:.2f}" for path in ("stacked", "exact", "lagged"))
    memory = {path: row["memory"] for path, row in largest["paths"].items()}
    return (
        f"The time of a step grows as {tasks}.\nAt K = {largest['num_tasks']} the temporary memory "
        f"is {memory['stacked']:.0f}x that of a plain step when stacked, and\n"
        f"{memory['exact']:.1f}x when exact.\n"
    )


def which() -> str:
    """The paths by situation."""
    of_mlp = read("overhead")["results"]["mlp"]
    exact = [of_mlp[k]["exact"]["time"] for k in ("2", "8")]
    of_slices = read("slices")["results"]
    titles = [f"MLP, K tasks, K = {k} of 32 rows" for k in (10, 50)]
    apart = [of_slices[title]["norms"]["time"] for title in titles]
    proxy = read("encoder")["results"]["contribution ratio with the encoder's weights"]
    rows = [
        (
            "you begin, or need exact weights",
            "`balanced_value_and_grad(losses_fn, rule)`",
            f"{exact[0]:.1f}x a plain step with 2 tasks, {exact[1]:.1f}x with 8 (an MLP)",
        ),
        (
            "every task has examples of its own",
            "`in_axes=0`",
            f"{apart[0]:.1f}x a plain step with 10 tasks, {apart[1]:.1f}x with 50 (an MLP)",
        ),
        (
            "it should be one transform in an optax chain",
            "`gaba()` on `task_value_and_grad`",
            "the same weights; K gradients in memory",
        ),
        (
            "a step must cost what a plain one does",
            "`every=10`",
            "exact at every tenth update; the weights are held in between",
        ),
        (
            "the same, and the model is an encoder under heads",
            "`encoder=`",
            "norms on the features are a proxy: contributions end within "
            f"{proxy['median']:.1f}x on FD001, 95 % of them within {proxy['95 %']:.0f}x",
        ),
        (
            "the model is large",
            '`measure_on=only("last_block")`',
            "norms of one block; a little more than a plain step",
        ),
        (
            "K gradients do not fit",
            '`measure="lagged"`',
            "one gradient in memory; weights one update old",
        ),
        (
            "the activations do not fit",
            "`microbatch_size=`",
            "each part runs forward anew for each task",
        ),
        (
            "a task may be NaN",
            '`nonfinite="drop"`',
            "at most what stacked gradients cost",
        ),
    ]
    return table(("when", "take", "what it costs"), rows) + "\n"


def large_models() -> str:
    """Counted from shapes."""
    document = read("large_models")
    results = document["results"]
    plain = results["plain"]
    rows = [
        (
            path,
            f"{of['operations'] / 1e12:.0f} Tflop, {of['operations'] / plain['operations']:.2f}x",
            f"{of['kept'] / 2**20:.0f} MiB, {of['kept'] / plain['kept']:.2f}x",
            f"{of['moved'] / 1e9:.0f} GB, {of['moved'] / plain['moved']:.2f}x",
        )
        for path, of in results.items()
    ]
    return (
        table(("a step, per chip", "operations", "gradients kept", "bytes received"), rows) + "\n"
    )


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


def slices() -> str:
    """Steps of tasks with examples of their own."""
    document = read("slices")
    rows = []
    for title, result in document["results"].items():
        for path, of in result.items():
            if path not in ("plain", "stacked"):
                cells = f"{of['milliseconds']:.1f}", f"{of['time']:.2f}", f"{of['memory']:.2f}"
                rows.append((title, path, *cells))
    versions = document["versions"]
    return (
        f"{document['machine']}; jax {versions['jax']}; TorchJD {versions['torchjd']}, "
        f"its engine and UPGrad beside `upgrad`, on PyTorch {versions['torch'].split('+')[0]}.\n\n"
        + table(("", "path", "ms", "time / plain", "memory / plain"), rows)
        + "\n"
    )


def slices_goals() -> str:
    """What they may cost; of TorchJD, by how much it should be behind."""
    rows = [
        (what, f"{goal['goal']:g}", f"{goal['measured']:.2f}", "yes" if goal["met"] else "no")
        for what, goal in read("slices")["goals"].items()
    ]
    return table(("", "goal", "measured", "met"), rows) + "\n"


def instance_wise() -> str:
    """Every example a task, and groups of them."""
    from benchmarks.instance_wise import COLUMNS, cells

    document = read("instance_wise")
    parts = []
    for condition, result in document["results"].items():
        rows = [(method, *cells(row)) for method, row in result.items()]
        parts.append(f"Digits, {condition}:\n\n" + table(("", *COLUMNS), rows) + "\n")
    return "\n".join(parts)


def control() -> str:
    """Ten arms, one network."""
    from benchmarks.control import COLUMNS, cells

    rows = [(method, *cells(row)) for method, row in read("control")["results"].items()]
    return table(("", *COLUMNS), rows) + "\n"


def control_updates() -> str:
    """Actor-critic updates."""
    from benchmarks.control import update_cells

    document = read("control")
    columns = [f"{what}, K = {k}" for k in document["updates"] for what in ("ms", "time", "memory")]
    first = next(iter(document["updates"].values()))
    rows = [
        (path, *(cell for of in document["updates"].values() for cell in update_cells(of[path])))
        for path in first
    ]
    return where(document) + table(("", *columns), rows) + "\n"


def auxiliary() -> str:
    """A main loss with auxiliaries."""
    from benchmarks.auxiliary import COLUMNS, cells

    document = read("auxiliary")
    times = document["times"]
    rows = [(name, *cells(row, times.get(name))) for name, row in document["results"].items()]
    return table(("", *COLUMNS), rows) + "\n"


def physics() -> str:
    """Physics-informed networks: every rule on every problem."""
    from benchmarks.physics import FIXED, RULES, at_equal_time

    results = read("physics")["results"]
    rows = []
    for method in RULES:
        cells, times = [], []
        for result in results.values():
            of, time = result["adam"][method], result["times"][method]
            final = statistics.mean(row[0] for row in of["errors"][-1])
            timed = statistics.mean(at_equal_time(of, time))
            cells.append(f"{final:.2g}, {timed:.2g}")
            times.append(time)
        step = "1" if method == FIXED else f"{min(times):.2f} to {max(times):.2f}"
        rows.append((method, *cells, step))
    head = ("relative L2 error, at equal steps and equal time", *results, "step / fixed")
    return table(head, rows) + "\n"


def preconditioned() -> str:
    """The same with other optimizers."""
    results = read("physics")["results"]
    rows = []
    for optimizer in ("adam", "muon", "lbfgs"):
        for method in ("fixed", "equalize"):
            cells = []
            for result in results.values():
                of = result[optimizer][method]
                last = of if optimizer == "lbfgs" else [row[0] for row in of["errors"][-1]]
                cells.append(f"{statistics.mean(last):.2g}")
            rows.append((f"{optimizer}, {method}", *cells))
    return table(("relative L2 error", *results), rows) + "\n"


def tables() -> dict[str, dict[str, str]]:
    """What stands after each marker, by page."""
    return {
        "choose_a_path.md": {start(part.__name__): part() for part in (which, large_models)},
        "slices.md": {start(part.__name__): part() for part in (slices, slices_goals)},
        "instance_wise.md": {start("instance_wise"): instance_wise()},
        "auxiliary_losses.md": {start("auxiliary"): auxiliary()},
        "physics_informed.md": {start(part.__name__): part() for part in (physics, preconditioned)},
        "control.md": {start(part.__name__): part() for part in (control, control_updates)},
        "published_experiment.md": {start("full_model"): full_model()},
        "benchmarks.md": {
            start(part.__name__): part()
            for part in (goals, growth, peers, moved, cancellation, import_time, loops, digits)
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
