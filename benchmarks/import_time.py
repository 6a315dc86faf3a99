"""What ``import gaba_jax`` costs over ``import optax``: ``python -m benchmarks.import_time``.

Fresh interpreters, interleaved; prints a table and writes benchmarks/import_time.json.
"""

import json
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

REPEATS = 15
MODULES = ("optax", "gaba_jax")


def seconds_to_import(module: str) -> float:
    program = (
        f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    return float(done.stdout)


def main() -> None:
    for module in MODULES:  # warm the file cache
        seconds_to_import(module)
    times: dict[str, list[float]] = {module: [] for module in MODULES}
    for _ in range(REPEATS):
        for module in MODULES:
            times[module].append(seconds_to_import(module))
    medians = {module: statistics.median(values) for module, values in times.items()}
    extra = medians["gaba_jax"] - medians["optax"]
    print(f"{'import':<10}{'median (s)':>12}")
    for module, median in medians.items():
        print(f"{module:<10}{median:>12.3f}")
    print(f"{'difference':<10}{extra:>12.3f}")
    result = {
        "seconds": medians,
        "difference": extra,
        "repeats": REPEATS,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("jax", "optax", "gaba-jax")},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
