"""What exact balancing costs a large model: ``python -m benchmarks.large_models``.

Arithmetic from shapes: no model is built and nothing is measured. A transformer of 6.7 B parameters
on 256 chips (FSDP), K losses on one trunk. Counts the operations of a step, the bytes of gradients
that are kept, and the bytes that a chip receives. Prints a table and writes
benchmarks/large_models.json.

Operations are those of products, 2 each; attention counts the causal half. Parameters are gathered
twice a step in 2 bytes, once forward and once backward; gradients are summed in 4 bytes, each one
that is kept by a reduce-scatter. Activations are the same on every path and are left out.
"""

import json
from pathlib import Path
from typing import NamedTuple

import tyro

RESULT = Path(__file__).with_suffix(".json")
GATHERED, SUMMED = 2, 4  # bytes of an element


class Shapes(NamedTuple):
    """Of the model, its batch and its mesh."""

    layers: int = 32
    width: int = 4096
    hidden: int = 11008
    vocabulary: int = 32000
    length: int = 4096
    sequences: int = 1024
    chips: int = 256
    num_tasks: int = 3
    every: int = 10

    def kernels(self) -> list[tuple[int, int]]:
        """Of one block: query, key, value and output, and three of a gated layer."""
        wide = (self.width, self.hidden)
        return [(self.width, self.width)] * 4 + [wide, wide, wide[::-1]]

    def block(self) -> int:
        return sum(rows * columns for rows, columns in self.kernels())

    def heads(self) -> int:
        """One head over the vocabulary; those of the other losses have one output each."""
        return self.width * (self.vocabulary + self.num_tasks - 1)

    def parameters(self) -> int:
        """With the table of embeddings, which no product reads."""
        return self.layers * self.block() + self.heads() + self.vocabulary * self.width

    def tokens(self) -> int:
        return self.length * self.sequences


def forward(shapes: Shapes) -> tuple[float, float]:
    """Operations of one block, and of the heads."""
    scores = 2 * 2 * shapes.tokens() * shapes.length / 2 * shapes.width
    return 2 * shapes.tokens() * shapes.block() + scores, 2 * shapes.tokens() * shapes.heads()


def count(shapes: Shapes) -> dict[str, dict[str, float]]:
    """Per path and chip: operations, bytes of gradients kept, bytes received."""
    k, of_all, of_block = shapes.num_tasks, shapes.parameters(), shapes.block()
    block, heads = forward(shapes)
    whole = shapes.layers * block + heads
    received = (shapes.chips - 1) / shapes.chips
    gathers = 2 * GATHERED * of_all

    def row(operations: float, kept: float, gathered: float) -> dict[str, float]:
        return {
            "operations": operations / shapes.chips,
            "kept": SUMMED * kept / shapes.chips,
            "moved": received * (gathered + SUMMED * kept),
        }

    plain = row(3 * whole, of_all, gathers)
    # A head has the gradient of its own loss alone, so K of them cost what one costs.
    trunk = of_all - shapes.heads()
    exact = row(3 * whole + 2 * (k - 1) * shapes.layers * block, of_all + (k - 1) * trunk, gathers)
    last = row(
        3 * whole + 2 * (k * block + heads),
        of_all + k * of_block,
        gathers + GATHERED * (of_block + shapes.heads()),
    )
    n = shapes.every
    every = {key: ((n - 1) * plain[key] + exact[key]) / n for key in plain}
    return {
        "plain": plain,
        "exact, or stacked": exact,
        "exact, on the last block": last,
        f"exact, every={n}": every | {"kept": exact["kept"]},
    }


def narrower(shapes: Shapes) -> dict[str, float]:
    """The sizes of the widest leaf and of the factor that it would be kept as."""
    rows, columns = max(shapes.kernels(), key=lambda shape: shape[0] * shape[1])
    leaf, factor = rows * columns, shapes.tokens() * columns
    return {"leaf": leaf, "factor": factor, "factor / leaf": factor / leaf}


def main(out: Path = RESULT) -> None:
    """Counts and writes.

    Args:
      out: the JSON to write.
    """
    shapes = Shapes()
    results, sides = count(shapes), narrower(shapes)
    print(f"{shapes.parameters() / 1e9:.2f} B parameters, {shapes.tokens() / 1e6:.1f} M tokens,")
    print(f"{shapes.chips} chips, K = {shapes.num_tasks}; per chip and step, and over plain:\n")
    units = {"operations": (1e12, "Tflop"), "kept": (2**20, "MiB"), "moved": (1e9, "GB")}
    for path, row in results.items():
        cells = [
            f"{key} {row[key] / unit:9.1f} {name} ({row[key] / results['plain'][key]:.2f}x)"
            for key, (unit, name) in units.items()
        ]
        print(f"{path:26}", *cells, sep="  ")
    print(f"\nThe widest leaf's factor is {sides['factor / leaf']:.0f}x the leaf.")
    document = {
        "shapes": shapes._asdict(),
        "parameters": shapes.parameters(),
        "tokens": shapes.tokens(),
        "widest": sides,
        "results": results,
    }
    out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
