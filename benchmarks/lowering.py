"""What the train steps become on other devices: ``python -m benchmarks.lowering``.

Exports every path for TPU and CUDA, for one device and for an abstract mesh of 256, and searches
the StableHLO for custom calls and callbacks. Compiles it for 8 CPU devices, the batch sharded over
them and the parameters replicated ("data parallel") or every kernel sharded too and gathered where
it is used ("fsdp", as in docs/meshes.md), counts the collectives and compares three steps with
those of one device. Prints tables, writes benchmarks/lowering.json, and exits with 1 on a call, a
failed export, a step that differs, or an exact step that moves more bytes than the stacked one.

A collective counts as often as a step runs it: times the trip counts of the loops around it. The
loop of ``gaba_jax._statistics.measure`` has none that XLA knows and does not count: it measures
anew after cancellation, or a norm out of the usual range. Of a conditional the branch that moves
the most counts: the one that measures. "most_bytes" counts that loop once. Bytes are one device's,
of operands or results, whichever are more; what the links carry depends on the algorithm.
"""

import functools
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import _measure
from benchmarks._models import Model, build
from benchmarks._paths import PATHS, Step, make_step

DEVICES, ABSTRACT_DEVICES = 8, 256
# Wide enough beside the batch for norms from factors.
EXPORTED: dict[str, Any] = {"batch_size": 256, "widths": (512, 1024, 1024)}
COMPILED: dict[str, Any] = {"batch_size": 32, "widths": (64, 128, 128, 128)}
MARKERS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}  # annotations, no calls
MESHES = {
    "one device": None,
    f"{ABSTRACT_DEVICES} devices, Auto": AxisType.Auto,
    f"{ABSTRACT_DEVICES} devices, Explicit": AxisType.Explicit,
}
LAYOUTS = ("data parallel", "fsdp")
STEPS, TOLERANCE = 3, 1e-5
RESULT = Path(__file__).with_suffix(".json")

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
Collectives = Counter[tuple[str, int]]  # (operation, bytes) -> executions
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")


def calls_out(step: Step, carry: Any, batch: Any, axis_type: AxisType | None) -> list[str]:
    """The custom calls and callbacks in the step's StableHLO for TPU and CUDA.

    With an axis type, on an abstract mesh: the batch sharded, the parameters replicated.
    """
    exporter = export.export(jax.jit(step), platforms=["tpu", "cuda"])
    if axis_type is None:
        exported = exporter(carry, batch)
    else:
        mesh = AbstractMesh((ABSTRACT_DEVICES,), ("data",), axis_types=(axis_type,))

        def placed(tree: Any, spec: P) -> Any:
            sharding = NamedSharding(mesh, spec)
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
            )

        with jax.sharding.use_abstract_mesh(mesh):
            exported = exporter(placed(carry, P()), placed(batch, P("data")))
    text = exported.mlir_module()
    calls = set(re.findall(r"custom_call @([\w.$]+)", text)) - MARKERS
    return sorted(calls | set(re.findall(r"\w*callback\w*", text)))


def collectives(hlo: str, rare: bool = False) -> Collectives:
    """What one run of a program compiled for CPU executes; rare: with what is seldom run."""
    computations: dict[str, list[tuple[str, ...]]] = {}
    sizes: dict[str, int] = {}
    entry, instructions = "", []
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            instructions = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            instructions.append(match.groups())
            sizes[match[1]] = _num_bytes(match[2])

    @functools.cache
    def of(computation: str) -> Collectives:
        total: Collectives = Counter()
        for name, _, operation, rest in computations[computation]:
            operands, _, attributes = rest.partition("), ")
            called = [c for c in re.findall(r"%([\w.-]+)", attributes) if c in computations]
            if operation in OPERATIONS:
                operand_bytes = sum(sizes[o] for o in re.findall(r"%([\w.-]+)", operands))
                total[operation, max(sizes[name], operand_bytes)] += 1
            elif operation == "while":
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
                trips = int(known[1]) if known else int(rare)
                for role, runs in (("body", trips), ("condition", trips + 1)):
                    inside = of(re.search(rf"{role}=%([\w.-]+)", attributes)[1])
                    total += Counter({key: runs * count for key, count in inside.items()})
            elif operation == "conditional":
                branches = sorted(map(of, called), key=moved)
                total += branches[-1]
            else:
                total += sum(map(of, called), Counter())
        return total

    return of(entry)


def uncounted_loops(hlo: str) -> int:
    """Loops whose trip count XLA does not know."""
    return sum(" while(" in line and "known_trip_count" not in line for line in hlo.splitlines())


def moved(found: Collectives) -> int:
    """Executions times bytes."""
    return sum(size * count for (_, size), count in found.items())


def _num_bytes(shape: str) -> int:
    """Of an HLO shape, a tuple's elements together."""
    bits = 0
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        width = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        bits += width * int(np.prod([int(n) for n in sizes.split(",") if n]))
    return bits // 8


def shardings(layout: str, mesh: jax.sharding.Mesh, params: Any, carry: Any) -> Any:
    """Those of the carry; under fsdp kernels are split on the first dimension that divides."""
    kernels = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1}

    def place(leaf: jax.Array) -> NamedSharding:
        spec = P()
        if layout == "fsdp" and leaf.shape in kernels:
            axis = next((i for i, n in enumerate(leaf.shape) if n % DEVICES == 0), None)
            spec = P() if axis is None else P(*[None] * axis, "data")
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, carry)


def gathered(model: Model, mesh: jax.sharding.Mesh) -> Model:
    """With the kernels gathered where they are used; else XLA may move activations instead."""
    everywhere = NamedSharding(mesh, P())

    def encoder(params: Any, *batch: jax.Array) -> jax.Array:
        return model.encoder(jax.lax.with_sharding_constraint(params, everywhere), *batch)

    return model._replace(encoder=encoder)


def deviation(carry: Any, expected: Any) -> float:
    """The norm of the difference over the norm, the largest of all leaves.

    Where both are rounding, as a solver's residual is, there is nothing to compare.
    """
    relative = []
    for leaf, right in zip(jax.tree.leaves(carry), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(leaf, np.float64), np.asarray(right, np.float64)
        largest = max(np.linalg.norm(a), np.linalg.norm(b))
        relative.append(0.0 if largest < 1e-5 else np.linalg.norm(a - b) / largest)
    return float(np.max(relative))


def exported(path: str, model: Model, num_tasks: int) -> dict[str, list[str]]:
    """Per mesh: what calls out, or the error that says the step cannot be exported for it."""
    step, carry = make_step(path, model, num_tasks)
    result = {}
    for name, axis_type in MESHES.items():
        try:
            result[name] = calls_out(step, carry, model.batch, axis_type)
        except Exception as error:  # jax's ShardingTypeError is not public
            result[name] = [type(error).__name__]
    return result


def compiled(
    path: str, model: Model, num_tasks: int, layouts: tuple[str, ...] = LAYOUTS
) -> dict[str, dict[str, Any]]:
    """Per layout: collectives, and how far three steps end from those on one device."""
    step, carry = make_step(path, model, num_tasks)
    if "cosines" not in path and path != "plain":  # past the warm-up: weights depend on the norms
        carry = optax.tree.set(carry, stabilize_step=jnp.int32(1000))
    one_device = jax.jit(step)
    expected = carry
    for _ in range(STEPS):
        expected, _ = one_device(expected, model.batch)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    result = {}
    for layout in layouts:
        placed = gathered(model, mesh) if layout == "fsdp" else model
        step, _ = make_step(path, placed, num_tasks)
        places = shardings(layout, mesh, model.params, carry)
        here = jax.device_put(carry, places)
        batch = jax.device_put(model.batch, NamedSharding(mesh, P("data")))
        program = jax.jit(step, out_shardings=(places, None)).lower(here, batch).compile()
        for _ in range(STEPS):
            here, _ = program(here, batch)
        hlo = program.as_text()
        found = collectives(hlo)
        result[layout] = {
            operation: {
                "executions": sum(n for (name, _), n in found.items() if name == operation),
                "bytes": sum(size * n for (name, size), n in found.items() if name == operation),
            }
            for operation in OPERATIONS
            if any(name == operation for name, _ in found)
        } | {
            "bytes": moved(found),
            "most_bytes": moved(collectives(hlo, rare=True)),
            "uncounted_loops": uncounted_loops(hlo),
            "deviation": deviation(here, expected),
        }
    return result


def table(title: str, rows: dict[str, dict[str, Any]], gradient_bytes: int) -> None:
    """Executions and KiB of each operation that any path has."""
    operations = [op for op in OPERATIONS if any(op in row for row in rows.values())]
    columns = ["path", *operations, "KiB", "KiB / gradient", "deviation"]

    def cell(row: dict[str, Any], operation: str) -> str:
        if operation not in row:
            return "-"
        return f"{row[operation]['executions']} ({row[operation]['bytes'] / 2**10:.1f})"

    cells = [
        [
            path,
            *(cell(row, operation) for operation in operations),
            f"{row['bytes'] / 2**10:.1f}",
            f"{row['bytes'] / gradient_bytes:.2f}",
            f"{row['deviation']:.1e}",
        ]
        for path, row in rows.items()
    ]
    _measure.show(title, columns, cells)


def main(
    path: tuple[str, ...] = PATHS, num_tasks: tuple[int, ...] = (2, 8), out: Path = RESULT
) -> None:
    """Exports, compiles, counts and writes.

    Args:
      path: the train steps.
      num_tasks: numbers of tasks K.
      out: the JSON to write.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    result: dict[str, Any] = {"devices": DEVICES, "exported": {}, "compiled": {}}
    wrong = []
    for k in num_tasks:
        wide, small = build("mlp", k, **EXPORTED), build("mlp", k, **COMPILED)
        gradient_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(small.params))
        calls = {p: exported(p, wide, k) for p in path}
        counts = {p: compiled(p, small, k) for p in path}
        result["exported"][str(k)] = calls
        result["compiled"][str(k)] = {"gradient_bytes": gradient_bytes} | {
            layout: {p: counts[p][layout] for p in path} for layout in LAYOUTS
        }
        _measure.show(
            f"Custom calls and callbacks for TPU and CUDA, K = {k}",
            ["path", *MESHES],
            [[p, *(", ".join(found) or "none" for found in calls[p].values())] for p in path],
        )
        for layout in LAYOUTS:
            title = f"{layout}, {DEVICES} devices, K = {k}: executions (KiB)"
            table(title, result["compiled"][str(k)][layout], gradient_bytes)
        for p, layout in itertools.product(path, LAYOUTS):
            if not counts[p][layout]["deviation"] <= TOLERANCE:  # NaN too
                wrong.append(f"{p}, K = {k}, {layout}: {counts[p][layout]['deviation']:.1e}")
        wrong += [f"{p}, K = {k}: {found}" for p in path for found in calls[p].values() if found]
        for layout in LAYOUTS if {"exact", "stacked"} <= set(path) else ():
            exact, stacked = (counts[p][layout]["bytes"] for p in ("exact", "stacked"))
            if exact > stacked:
                wrong.append(f"exact, K = {k}, {layout}: {exact} bytes, {stacked} when stacked")
    _measure.write(out, result)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    tyro.cli(main)
