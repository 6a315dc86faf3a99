"""What a training run is: data, model, rule and protocol, each with its default."""

import ast
import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from gaba_jax import weighting

TASKS = ("rul", "health")
Subset = Literal["FD001", "FD002", "FD003", "FD004"]


@dataclasses.dataclass(frozen=True)
class GabaOptions:
    """The options of gaba_jax.gaba, with its defaults."""

    beta: float = 0.99
    """decay of the average in [0, 1); 0 is no smoothing"""
    warmup_steps: int = 100
    """updates with equal weights before averaging starts"""
    min_weight: float = 0.05
    """floor under each weight"""
    floor: Literal["renormalize", "project"] = "renormalize"
    """clamp and renormalise (published), or the exact projection"""
    debias: bool = False
    """start the average at the first measurement instead of at equal weights"""
    task_priorities: tuple[float, float] | None = None
    """wanted ratio of contributions, RUL then health"""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Data, model, rule and protocol of one run. Defaults were chosen on validation engines."""

    data: Path | None = None
    """folder or .zip of C-MAPSS text, plain or .gz, or N-CMAPSS file (.h5); None simulates a small
    fleet"""
    subset: Subset = "FD001"
    """which of the four subsets"""
    sensors_only: bool = False
    """leave the three operating settings out of the features"""
    stride: int = 1
    """cycles between training windows"""
    model: Literal["compact", "full"] = "compact"
    """a network of 39 thousand parameters, or the published one of 3.5 million"""
    dropout: float = 0.1
    """share of the features dropped after each convolution of the full model"""
    weighting: str = "gaba"
    """how the two losses are weighted: a rule of gaba_jax.weighting, options after a colon
    (inverse_norm:power=0.5)"""
    gaba: GabaOptions = GabaOptions()
    shared: tuple[str, ...] = ()
    """names of the shared parameters; none given: found from the gradients"""
    measure_on: tuple[str, ...] = ()
    """names of the shared parameters to take norms on; none given: all"""
    weight_task_specific: bool = True
    """weight the gradients of the heads too (off needs --shared)"""
    nonfinite: Literal["propagate", "drop"] = "propagate"
    """what becomes of a NaN or Inf in one task's gradient ("drop" leaves the task out)"""
    measure: Literal["exact", "stacked", "lagged", "encoder"] = "exact"
    """exact norms in the memory of one gradient or, faster, of both; those of the update before;
    or those on the shared features, at the cost of a plain step"""
    every: int = 1
    """updates from one measurement to the next"""
    epochs: int = 15
    """passes over the training windows"""
    batch_size: int = 128
    """windows in a batch"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9"""
    learning_rate: float = 2e-3
    """peak of the schedule"""
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    """after the warm-up: cosine decay to 0, halved when validation stalls, or neither"""
    warmup_epochs: float = 0.0
    """epochs in which the learning rate rises linearly from 0"""
    plateau_patience: int = 10
    """epochs without a lower validation RMSE after which "plateau" halves the learning rate"""
    clip_norm: float | None = None
    """largest norm of the balanced gradient; None does not clip"""
    average_decay: float = 0.0
    """decay of the average of the model that is evaluated, in [0, 1); 0 is none"""
    early_stopping: int | None = None
    """epochs without a lower validation RMSE after which the run ends with the best; None never"""
    weight_decay: float = 1e-4
    """of AdamW"""
    adam_b2: float = 0.99
    """decay of AdamW's second moment"""
    loss: Literal["mse", "amnl"] = "mse"
    """of the RUL: mean squared error, or that weighted up towards failure"""
    seed: int = 0
    """of the simulated fleet, the validation engines, the parameters and the batches"""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'gaba'?"`` for a word that is nearly one of the known, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def rules() -> dict[str, Callable[..., weighting.Weighting]]:
    """The weightings that a name and options make: all that ``num_tasks`` is enough for."""
    found = {}
    for name in weighting.__all__:
        rule = getattr(weighting, name)
        if inspect.isfunction(rule):
            first, *others = inspect.signature(rule).parameters.values()
            optional = all(other.default is not other.empty for other in others)
            if first.name == "num_tasks" and optional:
                found[name] = rule
    return found


def parse_method(text: str) -> weighting.Weighting:
    """A weighting of the two tasks from its name and options.

    Norms are always measured, so that any rule can be watched.

    Args:
      text: ``"gaba"``, or ``"gaba:debias=true,warmup_steps=0"``.

    Returns:
      The weighting of the two tasks.

    Raises:
      ValueError: an unknown rule or option, or a value that the rule refuses.

    Example:
      >>> from gaba_jax.turbofan.config import parse_method
      >>> parse_method("gaba:debias=true,warmup_steps=0").num_tasks
      2
    """
    name, _, listed = text.partition(":")
    known = rules()
    if name not in known:
        raise ValueError(
            f"{text!r}: no weighting {name!r}.{did_you_mean(name, known)} There are: "
            f"{', '.join(sorted(known))}."
        )
    options: dict[str, Any] = {}
    for item in filter(None, re.split(r",(?=\w+=)", listed)):
        key, equals, value = item.partition("=")
        if key not in inspect.signature(known[name]).parameters or not equals:
            takes = [p for p in inspect.signature(known[name]).parameters if p != "num_tasks"]
            raise ValueError(
                f"{text!r}: {item!r} is no option of {name}.{did_you_mean(key, takes)} It takes "
                f"{', '.join(takes) or 'none'}."
            )
        words = {"true": True, "false": False, "none": None}
        try:
            options[key] = words[value] if value in words else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value  # a word, such as floor=project
    try:
        rule = known[name](len(TASKS), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text!r}: {error}") from error
    return rule._replace(needs=rule.needs | {"norms"})


def make_weighting(config: TrainConfig) -> weighting.Weighting:
    """The rule of a run, as :func:`parse_method`; of gaba with the options in ``config.gaba``."""
    if config.weighting == "gaba":
        rule = weighting.gaba(len(TASKS), **dataclasses.asdict(config.gaba))
        return rule._replace(needs=rule.needs | {"norms"})
    rule = parse_method(config.weighting)
    changed = [
        field.name
        for field in dataclasses.fields(GabaOptions)
        if getattr(config.gaba, field.name) != field.default
    ]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: options of the weighting gaba, without effect on "
            f"{config.weighting}. Leave them out, or take the weighting gaba."
        )
    return rule


def warmup_steps(config: TrainConfig) -> int:
    """Updates in which the rule of a run keeps equal weights, as published."""
    name, _, options = config.weighting.partition(":")
    if name != "gaba":
        return 0
    given = re.search(r"\bwarmup_steps=(\d+)", options)
    return int(given[1]) if given else config.gaba.warmup_steps


def identity(config: TrainConfig) -> dict[str, Any]:
    """What the numbers of a run depend on, beside the data, which may lie in another folder."""
    named = dataclasses.asdict(config)
    del named["data"]
    return named | {f"gaba.{name}": value for name, value in named.pop("gaba").items()}


def check_options(config: TrainConfig) -> None:
    """Raises a ValueError that names the option which is out of its range, whatever the data."""
    for name, hint in typing.get_type_hints(TrainConfig).items():
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
        value = getattr(config, name)
        if choices and value not in choices:
            meant = did_you_mean(str(value), choices)
            raise ValueError(f"{name}={value!r} must be one of {choices}.{meant}")
    for name in ("epochs", "batch_size", "stride", "every", "plateau_patience", "early_stopping"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    for name in ("learning_rate", "clip_norm"):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be positive.")
    for name in ("adam_b2", "average_decay", "dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be in [0, 1).")
    if not 0 <= config.weight_decay < float("inf"):
        raise ValueError(f"weight_decay={config.weight_decay} must be at least 0.")
    if config.measure == "stacked" and config.every > 1:
        raise ValueError(
            f'every={config.every} saves nothing with measure="stacked", whose gradients are there '
            'at each update; take measure="exact".'
        )
    if config.seed < 0:
        raise ValueError(f"seed={config.seed} must be at least 0.")


def check_config(config: TrainConfig, num_windows: int) -> None:
    """As :func:`check_options`, and for so many training windows."""
    check_options(config)
    if config.batch_size > num_windows:
        raise ValueError(
            f"batch_size={config.batch_size} is more than the {num_windows} training windows."
        )
    steps = num_windows // config.batch_size
    if not 0 <= round(config.warmup_epochs * steps) < config.epochs * steps:
        raise ValueError(
            f"warmup_epochs={config.warmup_epochs} must be at least 0 and less than the "
            f"{config.epochs} epochs, of {steps} updates each."
        )
