"""The tables of docs/weightings_measured.md: ``python -m benchmarks.weightings_page``.

Trains the golden two-layer problem with every rule, and writes between the markers of the page: its
final losses beside the times of weightings.json, and the tables of toy.json.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import toy
from benchmarks.performance import replace_between
from gaba_jax import balanced_value_and_grad, weighting
from gaba_jax.turbofan.config import rules
from gaba_jax.weighting import Weighting

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "weightings_measured.md"
GOLDEN = HERE.parent / "tests" / "golden" / "gaba_training_two_layer_adamw.npz"
RESULT = Path(__file__).with_suffix(".json")
# Beside the rules with their defaults: what gaba() is once its warm-up does not fill half the run.
SETTINGS = {
    "gaba(debias=True, warmup_steps=0, min_weight=0)": weighting.gaba(
        2, debias=True, warmup_steps=0, min_weight=0.0
    )
}
END = "<!-- end -->\n"
STEPS = 200
SIZES = ("2", "8", "32")


def losses_fn(params: Any, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Mean squared error of the RUL and cross entropy of the health state."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    h = linear("backbone.2", jax.nn.relu(linear("backbone.0", arrays["x"])))
    rul = arrays["rul"].reshape(-1)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(
        linear("health_head", h), arrays["health"]
    )
    return jnp.mean((linear("rul_head", h)[:, 0] - rul) ** 2), cross_entropy.mean()


def final_losses(rule: Weighting) -> list[float]:
    """[RUL, health] after the steps."""
    with np.load(GOLDEN) as file:
        arrays = {key: jnp.asarray(file[key]) for key in ("x", "rul")}
        arrays["health"] = jnp.asarray(file["health"], jnp.int32)
        params = {
            key.removeprefix("init/"): jnp.asarray(file[key])
            for key in file.files
            if key.startswith("init/")
        }
    balanced = balanced_value_and_grad(losses_fn, rule)
    tx = optax.adamw(1e-3)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state, opt_state = carry
        (_, grads), state = balanced.value_and_grad(params, state, arrays)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), None

    @jax.jit
    def train(params: Any) -> Any:
        start = (params, balanced.init(params), tx.init(params))
        (params, _, _), _ = jax.lax.scan(step, start, length=STEPS)
        return losses_fn(params, arrays)

    return [float(loss) for loss in train(params)]


def table() -> str:
    """As Markdown, from the JSON of the times and of the losses."""
    times = json.loads((HERE / "weightings.json").read_text())
    document = json.loads(RESULT.read_text())
    losses = document["losses"] | document["settings"]
    versions = times["versions"]
    columns = [*(f"K = {size}" for size in SIZES), "RUL loss", "health loss"]
    lines = ["| rule | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, (rul, health) in losses.items():
        cells = []
        for size in SIZES:
            row = times["results"][size].get(name)
            ratio = row.get("peer_ratio") if row else None
            peer = "" if ratio is None else f", {ratio:.{1 if ratio < 10 else 0}f}x"
            cells.append(f"{row['seconds'] * 1e6:.0f} µs{peer}" if row else "-")
        lines.append(f"| `{name}` | " + " | ".join([*cells, f"{rul:.0f}", f"{health:.3f}"]) + " |")
    where = (
        f"{times['machine']}; jax {versions['jax']}, PyTorch {versions['torch'].split('+')[0]}, "
        f"TorchJD {versions['torchjd']}."
    )
    return where + "\n\n" + "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """What stands after each marker of the page."""
    landscape, digits = toy.tables(json.loads(toy.RESULT.read_text())["results"])
    return {
        "<!-- made by benchmarks.weightings_page -->\n": table(),
        "<!-- made by benchmarks.toy: landscape -->\n": landscape + "\n",
        "<!-- made by benchmarks.toy: digits -->\n": digits + "\n",
    }


def main() -> None:
    """Trains, and writes JSON and page."""
    losses = {name: final_losses(make(2)) for name, make in rules().items()}
    settings = {name: final_losses(rule) for name, rule in SETTINGS.items()}
    document = {"steps": STEPS, "losses": losses, "settings": settings}
    RESULT.write_text(json.dumps(document, indent=2) + "\n")
    page = PAGE.read_text()
    for start, text in tables().items():
        page = replace_between(page, start, END, text)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
