"""How far ``encoder=`` is from the exact weights: ``python -m benchmarks.encoder [--data DIR]``.

Trains the compact turbofan model with exact weights and, at the same parameters and batches,
measures on the 32 shared features as well. Prints a table and writes benchmarks/encoder.json.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx

from benchmarks import _measure
from gaba_jax import balanced_value_and_grad, weighting
from gaba_jax.turbofan.losses import cross_entropy, mean_squared_error
from gaba_jax.turbofan.model import CompactModel
from gaba_jax.turbofan.train import TrainConfig, load_data

RESULT = Path(__file__).with_suffix(".json")


def main(data: Path | None = None, epochs: int = 3, out: Path = RESULT) -> None:
    """Measures and writes.

    Args:
      data: folder with C-MAPSS FD001; simulated engines without.
      epochs: of training.
      out: the JSON to write.
    """
    config = TrainConfig(data=data, epochs=epochs)
    split = jax.device_put(load_data(config).train)
    num_windows, window, channels = split.windows.shape
    graph, params = nnx.split(CompactModel(window, channels, rngs=nnx.Rngs(0)), nnx.Param)

    def encoder(params: Any, batch: Any) -> Any:
        return nnx.merge(graph, params).backbone(batch.windows)

    def heads(params: Any, features: Any, batch: Any) -> Any:
        model = nnx.merge(graph, params)
        rul, logits = model.rul_head(features)[:, 0], model.health_head(features)
        return mean_squared_error(rul, batch.rul), cross_entropy(logits, batch.health)

    rule = weighting.inverse_share(2)
    exact = balanced_value_and_grad(lambda p, b: heads(p, encoder(p, b), b), rule)
    proxy = balanced_value_and_grad(heads, rule, encoder=encoder)
    adamw = optax.adamw(config.learning_rate, b2=config.adam_b2)
    size = config.batch_size

    def step(carry: Any, rows: Any) -> Any:
        params, opt_state = carry
        batch = jax.tree.map(lambda column: column[rows], split)
        (_, grads), state = exact.value_and_grad(params, exact.init(params), batch)
        _, other = proxy.value_and_grad(params, proxy.init(params), batch)
        updates, opt_state = adamw.update(grads, opt_state, params)
        norms = state.task_norms, other.task_norms
        return (optax.apply_updates(params, updates), opt_state), norms

    keys = jax.random.split(jax.random.key(0), epochs)
    steps = num_windows // size
    rows = [jax.random.permutation(key, num_windows)[: steps * size] for key in keys]
    rows = np.concatenate(rows).reshape(-1, size)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, rows))
    _, norms = run((params, adamw.init(params)))
    ratios = {
        name: np.asarray(n[:, 0] / n[:, 1])
        for name, n in zip(("exact", "encoder"), norms, strict=True)
    }
    health = {name: ratio / (1 + ratio) for name, ratio in ratios.items()}
    left = np.maximum(ratios["exact"] / ratios["encoder"], ratios["encoder"] / ratios["exact"])
    results = {
        "gradient ratio, exact": ratios["exact"],
        "gradient ratio, encoder": ratios["encoder"],
        "contribution ratio with the encoder's weights": left,
        "difference of the health weight": np.abs(health["exact"] - health["encoder"]),
    }
    summary = {
        name: dict(
            zip(("5 %", "median", "95 %"), np.quantile(v, [0.05, 0.5, 0.95]).tolist(), strict=True)
        )
        for name, v in results.items()
    }
    rows_ = [[name, *(f"{v:.3g}" for v in row.values())] for name, row in summary.items()]
    _measure.show(f"{len(rows)} updates", ["", "5 %", "median", "95 %"], rows_)
    source = "simulated" if data is None else config.subset
    _measure.write(out, {"data": source, "updates": len(rows), "results": summary})


if __name__ == "__main__":
    tyro.cli(main)
