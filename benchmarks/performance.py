"""The README's section on performance, and that of docs/benchmarks.md, from overhead and peers.

``python -m benchmarks.performance`` writes both between their markers: into the README a table of
three paths, into the page one of all and three sentences. The tables of PyTorch and of growth are
benchmarks.docs_pages'.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks._paths import PATHS

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PAGE = HERE.parent / "docs" / "benchmarks.md"
START, END = "<!-- made by benchmarks.performance -->\n", "<!-- end -->\n"
SHORT = ("stacked", "exact", "encoder")  # paths in the README's table
WHICH = (
    "`stacked` is `gaba()` on `task_value_and_grad`, `exact` is `balanced_value_and_grad`, and "
    "`encoder` measures on features. "
)
FEWEST_ROUNDS = 5  # fewer are no measurement
MODELS = {
    "mlp": "MLP",
    "turbofan": "turbofan",
    "lstm": "LSTM",
    "transformer": "transformer",
    "full network": "full network",
}


def read(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text())


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def overhead(paths: Sequence[str]) -> str:
    """The table."""
    document = read("overhead")
    results = document["results"]
    head = [f"{title}, K = 2" for title in MODELS.values()] + ["MLP, K = 8", "memory, MLP, K = 8"]
    lines = [row("", *head), "|---|" + "---|" * len(head)]
    for path in paths:
        large = results["mlp"]["8"][path]
        measured = [results.get(name, {}).get("2", {}).get(path) for name in MODELS]
        cells = [f"{of['time']:.2f}" if of else "-" for of in (*measured, large)]
        lines.append(row(path, *cells, f"{large['memory']:.2f}"))
    versions = document["versions"]
    where = f"{document['machine']}; jax {versions['jax']}, float32, batch 64"
    return (
        "Time of a train step over that of a step with fixed weights, in medians over interleaved "
        f"rounds, and temporary memory likewise ({where}; `python -m benchmarks.overhead`).\n\n"
        + "\n".join(lines)
        + "\n"
    )


def of_many_tasks() -> str:
    """A sentence on the largest K."""
    of_mlp = read("overhead")["results"]["mlp"]
    k = max(of_mlp, key=int)
    exact, stacked = of_mlp[k]["exact"], of_mlp[k]["stacked"]
    return (
        f"With {k} tasks an exact step of the MLP takes {exact['time']:.1f}x the time and "
        f"{exact['memory']:.1f}x the memory of a plain one, and a stacked step "
        f"{stacked['time']:.0f}x and {stacked['memory']:.0f}x."
    )


def beside_pytorch() -> str:
    """A sentence on PyTorch and TorchJD."""
    document = read("peers")
    versions, results = document["versions"], document["results"]

    def faster(path: str, peer: str) -> str:
        times = [
            f"{result[peer][f'times_{path}']:.2f}x ({MODELS[name]})"
            for name, result in results.items()
        ]
        return " and ".join(times)

    return (
        f"PyTorch {versions['torch'].split('+')[0]} takes {faster('exact', 'torch published')} the "
        f"time of an exact step for the published one,\nand TorchJD {versions['torchjd']} with "
        f"UPGrad takes {faster('exact, UPGrad', 'TorchJD UPGrad')} that of UPGrad here "
        "(`python -m benchmarks.peers`)."
    )


def short_runs() -> str:
    """A warning where the JSON is not of a whole run."""
    names = [name for name in ("overhead", "peers") if read(name)["rounds"] < FEWEST_ROUNDS]
    return f"\n**Placeholders, of a short run: {', '.join(names)}.**\n" if names else ""


def section(paths: Sequence[str] = SHORT) -> str:
    if paths == SHORT:
        return f"{WHICH}{overhead(paths)}{short_runs()}"
    return f"{overhead(paths)}\n{of_many_tasks()} {beside_pytorch()}\n{short_runs()}"


def replace_between(text: str, start: str, end: str, new: str) -> str:
    """The text with what stands between two markers replaced."""
    before, _, rest = text.partition(start)
    return before + start + new + end + rest.partition(end)[2]


def main() -> None:
    for page, paths in ((README, SHORT), (PAGE, PATHS)):
        page.write_text(replace_between(page.read_text(), START, END, section(paths)))


if __name__ == "__main__":
    main()
