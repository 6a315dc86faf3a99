"""The README's section on performance, from the JSON of overhead, scaling, peers and encoder.

``python -m benchmarks.performance`` writes it between the markers in README.md.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- made by benchmarks.performance -->\n", "<!-- end -->\n"
MODELS = {"mlp": "MLP", "turbofan": "turbofan", "lstm": "LSTM", "transformer": "transformer"}


def read(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text())


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def overhead() -> str:
    document = read("overhead")
    results = document["results"]
    head = [f"{title}, K = 2" for title in MODELS.values()] + ["MLP, K = 8", "memory, MLP, K = 8"]
    lines = [row("", *head), "|---|" + "---|" * len(head)]
    for path, large in results["mlp"]["8"].items():
        times = [results[name]["2"][path]["time"] for name in MODELS] + [large["time"]]
        lines.append(row(path, *(f"{time:.2f}" for time in times), f"{large['memory']:.2f}"))
    versions = document["versions"]
    where = f"{document['machine']}; jax {versions['jax']}, float32, batch 64"
    return (
        "Time of a train step with AdamW over that of the same step with fixed weights, medians\n"
        "over interleaved rounds, and XLA's temporary memory likewise\n"
        f"({where};\n`python -m benchmarks.overhead`):\n\n" + "\n".join(lines) + "\n"
    )


def peers() -> str:
    document = read("peers")
    versions = document["versions"]
    paths = next(iter(document["results"].values())).keys()
    lines = [row("", *(MODELS[name] for name in document["results"]))]
    lines.append("|---|" + "---|" * len(document["results"]))
    for path in paths:
        cells = [
            f"{result[path]['milliseconds']:.1f} ms, {result[path]['times_exact']:.2f}x"
            for result in document["results"].values()
        ]
        lines.append(row(path, *cells))
    plain = [
        f"{result['torch plain']['milliseconds'] / result['plain']['milliseconds']:.2f}x ours "
        f"on the {MODELS[name]}"
        for name, result in document["results"].items()
    ]
    return (
        "The same model, batch and optimizer in PyTorch on the same cores, two tasks, and how many "
        "times\nthe time of exact each takes "
        f"(PyTorch {versions['torch'].split('+')[0]} eager, TorchJD {versions['torchjd']};\n"
        f"`python -m benchmarks.peers`). A plain step takes PyTorch {' and '.join(plain)},\n"
        "which is where a lead or a lag on any row begins:\n\n" + "\n".join(lines) + "\n"
    )


def growth() -> str:
    document = read("scaling")
    fitted, largest = document["exponents"]["num_tasks"], document["results"]["num_tasks"][-1]
    tasks = ", ".join(f"{path} K^{fitted[path]:.2f}" for path in ("stacked", "exact", "lagged"))
    memory = {path: row["memory"] for path, row in largest["paths"].items()}
    stacked = memory.pop("stacked")
    return (
        f"With the number of tasks the time of a step grows as {tasks}.\n"
        f"At K = {largest['num_tasks']} its temporary memory is {stacked:.0f}x a plain step's when "
        f"stacked, at most {max(memory.values()):.1f}x\notherwise "
        "(`python -m benchmarks.scaling`):\n\n"
        "![Time and memory over those of a plain step, by tasks and by parameters]"
        "(docs/images/scaling.png)\n"
    )


def which() -> str:
    proxy = read("encoder")["results"]["contribution ratio with the encoder's weights"]
    lines = [
        row("path", "take it when"),
        "|---|---|",
        row(
            "`gaba()` on `task_value_and_grad`",
            "it should be one transform in any optax chain; K gradients in memory, reduced across "
            "devices once, with K times the bytes",
        ),
        row(
            "`balanced_value_and_grad`",
            "memory or K is what limits you: one gradient in memory, the same weights; K + 1 "
            'reductions; `norms="ghost"` for wide layers',
        ),
        row(
            '`measure="lagged"`',
            "weights one update old will do, or a NaN task must be dropped: one backward pass less",
        ),
        row(
            "`encoder=`, or `every=10`",
            "it must cost what a plain step costs: measured on the features (contributions within "
            f"{proxy['median']:.1f}x on FD001, {proxy['95 %']:.0f}x at worst in 95 % of updates), "
            "or exactly, but not every time",
        ),
    ]
    return "\n".join(lines) + "\n"


def section() -> str:
    return "\n".join([overhead(), growth(), peers(), which()])


def replace_between(text: str, start: str, end: str, new: str) -> str:
    """The text with what stands between two markers replaced."""
    before, _, rest = text.partition(start)
    return before + start + new + end + rest.partition(end)[2]


def main() -> None:
    README.write_text(replace_between(README.read_text(), START, END, section()))


if __name__ == "__main__":
    main()
