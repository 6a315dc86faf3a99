"""NASA C-MAPSS turbofan data: read, normalised per operating condition, cut into windows.

:func:`load` does it all from a folder, :func:`prepare` from tables that are in memory already.

A table has one row per engine and cycle and 26 columns: engine, cycle, 3 operating settings
(altitude in 1000 ft, Mach number, throttle resolver angle), 21 sensors. No file holds health
labels; they follow from the remaining useful life (RUL), counted in cycles.

References:
    Saxena, Goebel, Simon, Eklund, "Damage Propagation Modeling for Aircraft Engine
    Run-to-Failure Simulation", PHM 2008.
    Heimes, "Recurrent neural networks for remaining useful life estimation", PHM 2008 (the cap).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gaba_jax.turbofan._cmapss_reader import (
    COLUMN_NAMES,
    INFORMATIVE_SENSORS,
    Fleet,
    check_fleet,
    read_fleet,
    read_rul,
    read_table,
)
from gaba_jax.turbofan._normalization import (
    FEATURE_NAMES,
    SETTING_TOLERANCES,
    Normalization,
    Standardization,
    fit_normalization,
    normalize,
)

__all__ = [
    "COLUMN_NAMES",
    "CRITICAL_UP_TO",
    "HEALTH_NAMES",
    "INFORMATIVE_SENSORS",
    "MAX_RUL",
    "NORMAL_ABOVE",
    "SETTING_TOLERANCES",
    "WINDOW",
    "Fleet",
    "Normalization",
    "Split",
    "Standardization",
    "TurbofanData",
    "check_fleet",
    "choose_held_out",
    "fit_normalization",
    "health_from_rul",
    "load",
    "normalize",
    "prepare",
    "read_fleet",
    "read_rul",
    "read_table",
]

MAX_RUL = 125.0
"""Cycles at which the RUL target is capped: a young engine shows no wear yet."""

NORMAL_ABOVE = 80.0
"""An engine with more cycles than this left is normal (class 0)."""

CRITICAL_UP_TO = 30.0
"""An engine with at most this many cycles left is critical (class 2)."""

HEALTH_NAMES = ("normal", "degrading", "critical")
"""The health classes, in the order of their labels 0, 1, 2."""

WINDOW = 30
"""Cycles that the model sees at once."""


class Split(NamedTuple):
    """Windows with their targets; all arrays have the same first axis.

    Attributes:
        windows: Normalised features of the cycles up to the target's, float32 [N, window, F].
        rul: RUL after the last cycle of the window, capped, float32 [N].
        health: 0 normal, 1 degrading, 2 critical, from the capped RUL, int32 [N].
        engine: The engine's number in its table, int32 [N].
        rul_uncapped: RUL without the cap, float32 [N].
    """

    windows: NDArray[np.float32]
    rul: NDArray[np.float32]
    health: NDArray[np.int32]
    engine: NDArray[np.int32]
    rul_uncapped: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TurbofanData:
    """What a model trains and is judged on.

    Attributes:
        train: Windows of the training engines.
        validation: Windows of the engines held out from the training table.
        test: The last window of each test engine.
        feature_names: The F columns of a window, such as ``"setting_1"`` and ``"sensor_2"``.
        normalization: The statistics that the features were normalised with.
        test_all: Every window of the test engines; None where ``test`` holds them.
    """

    train: Split
    validation: Split
    test: Split
    feature_names: tuple[str, ...]
    normalization: Normalization | Standardization
    test_all: Split | None = None


def load(
    folder: str | Path,
    subset: str = "FD001",
    *,
    window: int = WINDOW,
    stride: int = 1,
    sensors_only: bool = False,
    validation_fraction: float = 0.2,
    seed: int = 0,
    max_rul: float = MAX_RUL,
) -> TurbofanData:
    """Read one subset from a folder and prepare it for a model.

    Args:
        folder: Holds the three files, or is an archive of them, as in :func:`read_fleet`.
        subset: The files' common name. Defaults to ``"FD001"``.
        window: As in :func:`prepare`, as are all that follow.
        stride: Cycles between two windows, except those of ``test``.
        sensors_only: Leave the settings out of the features.
        validation_fraction: Share of the training engines that is held out.
        seed: Chooses the validation engines.
        max_rul: Cap of the RUL target, in cycles.

    Raises:
        FileNotFoundError: The folder or a file is missing.
        ValueError: As in :func:`read_fleet` and :func:`prepare`.

    Examples:
        >>> import tempfile
        >>> from gaba_jax.turbofan import simulator
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     simulator.write(simulator.simulate(num_train=5, num_test=2), folder)
        ...     engines = load(folder)
        >>> engines.train.windows.shape[1:], engines.feature_names[3]
        ((30, 17), 'sensor_2')
    """
    return prepare(
        read_fleet(folder, subset),
        window=window,
        stride=stride,
        sensors_only=sensors_only,
        validation_fraction=validation_fraction,
        seed=seed,
        max_rul=max_rul,
    )


def prepare(
    fleet: Fleet,
    *,
    window: int = WINDOW,
    stride: int = 1,
    sensors_only: bool = False,
    validation_fraction: float = 0.2,
    seed: int = 0,
    max_rul: float = MAX_RUL,
) -> TurbofanData:
    r"""Normalise the tables of a fleet and cut them into windows.

    .. math::
        \text{RUL}_t = \min(T - t, \texttt{max\_rul})

    for the training table, with the engine's last cycle :math:`T`; for the test table :math:`T - t`
    is the fleet's ``test_rul``. An engine shorter than a window is padded at the front with copies
    of its first row. The last cycle of every engine ends a window, whatever the stride.

    Args:
        fleet: The tables.
        window: Cycles in a window, at least 1. Defaults to 30.
        stride: Cycles between two windows, except those of ``test``, at least 1. Defaults to 1.
        sensors_only: Use the 14 sensors without the 3 settings. Defaults to False, 17 features.
        validation_fraction: Share of the training engines that is held out, in [0, 1), rounded to
            whole engines and at least one unless it is 0. Defaults to 0.2.
        seed: Chooses the validation engines. Defaults to 0.
        max_rul: Cap of the RUL target, in cycles, positive. Defaults to 125.

    Raises:
        ValueError: A table or an argument breaks its rule, or :func:`normalize` fails.

    Examples:
        >>> from gaba_jax.turbofan import simulator
        >>> fleet = simulator.simulate(num_train=5, num_test=2)
        >>> prepare(fleet, sensors_only=True).test.windows.shape
        (2, 30, 14)
    """
    if window < 1:
        raise ValueError(f"{window=} must be at least 1 cycle.")
    if stride < 1:
        raise ValueError(f"{stride=} must be at least 1 cycle.")
    if not 0.0 < max_rul < np.inf:
        raise ValueError(f"{max_rul=} must be a positive number of cycles.")
    check_fleet(fleet)
    held_out = choose_held_out(np.unique(fleet.train[:, 0]), validation_fraction, seed)
    is_validation = np.isin(fleet.train[:, 0], held_out)
    train_rows, validation_rows = fleet.train[~is_validation], fleet.train[is_validation]
    normalization = fit_normalization(train_rows)
    left_out = 3 if sensors_only else 0  # the settings come first

    def split(
        rows: NDArray[np.float64],
        name: str,
        rul_at_end: NDArray[np.float64] | None = None,
        *,
        last: bool = False,
    ) -> Split:
        features = normalize(rows, normalization, name=name)[:, left_out:]
        _, of_row, lives = np.unique(rows[:, 0], return_inverse=True, return_counts=True)
        cycle = rows[:, 1].astype(np.intp)
        left = lives[of_row] - cycle
        ends = np.flatnonzero(left == 0 if last else left % stride == 0)
        first = ends - cycle[ends] + 1
        members = np.maximum(ends[:, None] + np.arange(1 - window, 1), first[:, None])
        uncapped = left[ends]
        if rul_at_end is not None:
            numbered = np.cumsum(cycle == 1) - 1  # engines in the order of the table, as the RULs
            uncapped = uncapped + rul_at_end[numbered[ends]]
        capped = np.minimum(uncapped, max_rul)
        return Split(
            windows=features[members],
            rul=capped.astype(np.float32),
            health=health_from_rul(capped),
            engine=rows[ends, 0].astype(np.int32),
            rul_uncapped=uncapped.astype(np.float32),
        )

    return TurbofanData(
        train=split(train_rows, "training"),
        validation=split(validation_rows, "validation"),
        test=split(fleet.test, "test", fleet.test_rul, last=True),
        feature_names=FEATURE_NAMES[left_out:],
        normalization=normalization,
        test_all=split(fleet.test, "test", fleet.test_rul),
    )


def choose_held_out(engines: NDArray[Any], fraction: float, seed: int) -> NDArray[Any]:
    """The engines to validate on; see ``validation_fraction`` of :func:`prepare`."""
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"validation_fraction={fraction} must be in [0, 1).")
    count = max(1, round(fraction * len(engines))) if fraction else 0
    if count >= len(engines):
        raise ValueError(
            f"validation_fraction={fraction} holds out {count} of {len(engines)} training engines, "
            "which leaves none to train on; pass a smaller one, or more engines."
        )
    return np.random.default_rng(seed).permutation(engines)[:count]


def health_from_rul(
    rul: ArrayLike, *, normal_above: float = NORMAL_ABOVE, critical_up_to: float = CRITICAL_UP_TO
) -> NDArray[np.int32]:
    """Classify engines by the cycles they have left.

    Args:
        rul: RUL in cycles, any shape.
        normal_above: RUL above which an engine is normal. Defaults to 80 cycles.
        critical_up_to: RUL up to which it is critical. Defaults to 30 cycles.

    Returns:
        0 normal (RUL > 80), 1 degrading (30 < RUL <= 80), 2 critical (RUL <= 30), int32 of the
        shape of ``rul``.

    Raises:
        ValueError: A RUL is NaN.

    Examples:
        >>> health_from_rul([125.0, 80.0, 30.0]).tolist()
        [0, 1, 2]
    """
    cycles = np.asarray(rul, np.float64)
    if np.isnan(cycles).any():
        raise ValueError("rul holds a NaN, which has no health class; remove it first.")
    return (cycles <= normal_above).astype(np.int32) + (cycles <= critical_up_to)
