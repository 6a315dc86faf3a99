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
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gaba_jax.turbofan._reader import (
    COLUMN_NAMES,
    INFORMATIVE_SENSORS,
    Fleet,
    check_fleet,
    check_shape,
    read_fleet,
    read_rul,
    read_table,
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
    "TurbofanData",
    "check_fleet",
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

SETTING_TOLERANCES = (1.0, 0.05, 1.0)
"""Largest gap within one operating condition: 1000 ft, Mach number, degrees."""

_SETTINGS = slice(2, 5)
_SENSORS = [4 + sensor for sensor in INFORMATIVE_SENSORS]
_FEATURE_NAMES = (*COLUMN_NAMES[_SETTINGS], *(COLUMN_NAMES[column] for column in _SENSORS))
_CONDITION = "(altitude {:.1f}, Mach {:.2f}, throttle {:.1f})"


class Normalization(NamedTuple):
    """Statistics of the training engines; a scale of 0 marks a constant column, which becomes 0.

    Attributes:
        conditions: Smallest and largest settings of each operating condition, [C, 2, 3].
        setting_mean: Mean of each setting over all rows, [3].
        setting_scale: Standard deviation of each setting over all rows, [3].
        sensor_mean: Mean of each informative sensor in each condition, [C, 14].
        sensor_scale: Standard deviation of each informative sensor in each condition, [C, 14].
    """

    conditions: NDArray[np.float64]
    setting_mean: NDArray[np.float64]
    setting_scale: NDArray[np.float64]
    sensor_mean: NDArray[np.float64]
    sensor_scale: NDArray[np.float64]


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
    """

    train: Split
    validation: Split
    test: Split
    feature_names: tuple[str, ...]
    normalization: Normalization


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
        folder: Holds the three files, as in :func:`read_fleet`.
        subset: The files' common name. Defaults to ``"FD001"``.
        window: As in :func:`prepare`, as are all that follow.
        stride: Cycles between two training or validation windows.
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
        stride: Cycles between two training or validation windows, at least 1. Defaults to 1.
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
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(f"{validation_fraction=} must be in [0, 1).")
    engines = np.unique(fleet.train[:, 0])
    count = max(1, round(validation_fraction * len(engines))) if validation_fraction else 0
    if count >= len(engines):
        raise ValueError(
            f"{validation_fraction=} holds out {count} of {len(engines)} training engines, which "
            "leaves none to train on; pass a smaller one, or more engines."
        )
    held_out = np.random.default_rng(seed).permutation(engines)[:count]
    is_validation = np.isin(fleet.train[:, 0], held_out)
    train_rows, validation_rows = fleet.train[~is_validation], fleet.train[is_validation]
    normalization = fit_normalization(train_rows)
    left_out = 3 if sensors_only else 0  # the settings come first

    def split(rows: NDArray[np.float64], name: str, rul: NDArray[np.float64] | None) -> Split:
        features = normalize(rows, normalization, name=name)[:, left_out:]
        _, of_row, lives = np.unique(rows[:, 0], return_inverse=True, return_counts=True)
        cycle = rows[:, 1].astype(np.intp)
        left = lives[of_row] - cycle
        ends = np.flatnonzero(left % stride == 0 if rul is None else left == 0)
        first = ends - cycle[ends] + 1
        members = np.maximum(ends[:, None] + np.arange(1 - window, 1), first[:, None])
        uncapped = left[ends] if rul is None else rul
        capped = np.minimum(uncapped, max_rul)
        return Split(
            windows=features[members],
            rul=capped.astype(np.float32),
            health=health_from_rul(capped),
            engine=rows[ends, 0].astype(np.int32),
            rul_uncapped=uncapped.astype(np.float32),
        )

    return TurbofanData(
        train=split(train_rows, "training", None),
        validation=split(validation_rows, "validation", None),
        test=split(fleet.test, "test", fleet.test_rul),
        feature_names=_FEATURE_NAMES[left_out:],
        normalization=normalization,
    )


def health_from_rul(rul: ArrayLike) -> NDArray[np.int32]:
    """Classify engines by the cycles they have left.

    Args:
        rul: RUL in cycles, any shape.

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
    return (cycles <= NORMAL_ABOVE).astype(np.int32) + (cycles <= CRITICAL_UP_TO)


def fit_normalization(rows: NDArray[np.float64]) -> Normalization:
    """Find the operating conditions of a table and its statistics in each.

    The values of each setting are sorted and cut where neighbours lie further apart than
    :data:`SETTING_TOLERANCES`; a condition is a combination of the three groups. This finds one
    condition in FD001 and FD003, six in FD002 and FD004, whatever the order of the rows.

    Args:
        rows: Training rows, [rows, 26].

    Returns:
        The statistics; conditions in ascending order of altitude, Mach number and throttle.

    Raises:
        ValueError: There are no rows, or not 26 columns.

    Examples:
        >>> from gaba_jax.turbofan import simulator
        >>> fleet = simulator.simulate(num_train=2, num_test=1, conditions=6)
        >>> fit_normalization(fleet.train).conditions[:, 0, 0].round().tolist()
        [0.0, 10.0, 20.0, 25.0, 35.0, 42.0]
    """
    check_shape(rows, "rows", least=1)
    settings, sensors = rows[:, _SETTINGS], rows[:, _SENSORS]
    groups = np.empty(settings.shape, np.intp)
    for axis, tolerance in enumerate(SETTING_TOLERANCES):
        values, of_row = np.unique(settings[:, axis], return_inverse=True)
        groups[:, axis] = np.cumsum(np.diff(values, prepend=values[0]) > tolerance)[of_row]
    combinations, of_row = np.unique(groups, axis=0, return_inverse=True)
    members = [of_row.reshape(-1) == condition for condition in range(len(combinations))]
    return Normalization(
        conditions=np.stack([[settings[m].min(axis=0), settings[m].max(axis=0)] for m in members]),
        setting_mean=settings.mean(axis=0),
        setting_scale=_scale(settings),
        sensor_mean=np.stack([sensors[m].mean(axis=0) for m in members]),
        sensor_scale=np.stack([_scale(sensors[m]) for m in members]),
    )


def normalize(
    rows: NDArray[np.float64], normalization: Normalization, *, name: str = "new"
) -> NDArray[np.float32]:
    r"""Turn a table into features.

    .. math::
        z = (x - \mu) / \sigma

    with the mean and the standard deviation over all training rows for a setting, over those of
    the row's operating condition for a sensor. A column that was constant there becomes 0.

    Args:
        rows: The table, [rows, 26].
        normalization: Statistics of the training engines, from :func:`fit_normalization`.
        name: What to call these engines in an error. Defaults to ``"new"``.

    Returns:
        The 3 settings and the 14 informative sensors, float32 [rows, 17].

    Raises:
        ValueError: There are not 26 columns, no training engine has seen a row's condition, or a
            feature is no finite float32.

    Examples:
        >>> from gaba_jax.turbofan import simulator
        >>> fleet = simulator.simulate(num_train=2, num_test=1)
        >>> features = normalize(fleet.train, fit_normalization(fleet.train))
        >>> features.shape[1], bool(abs(features.mean()) < 1e-6)
        (17, True)
    """
    check_shape(rows, "rows", least=0)
    settings, low, high = rows[:, None, _SETTINGS], *normalization.conditions.swapaxes(0, 1)
    outside = np.abs(settings - np.clip(settings, low, high))
    distance = (outside / SETTING_TOLERANCES).max(axis=2)
    unseen = np.flatnonzero(distance.min(axis=1) > 1.0)
    if len(unseen):
        engine, cycle, *setting = rows[unseen[0], :5]
        seen = [_CONDITION.format(*ends.mean(axis=0)) for ends in normalization.conditions]
        raise ValueError(
            f"{name} engine {engine:.0f}, cycle {cycle:.0f}, flies in the operating condition "
            f"{_CONDITION.format(*setting)}, which no training engine has seen (they have seen "
            f"{'; '.join(seen)}); train on engines that fly there, hold out fewer or other ones "
            "for validation (validation_fraction, seed), or leave this engine out."
        )
    nearest = distance.argmin(axis=1)
    parts = (
        (_SETTINGS, normalization.setting_mean, normalization.setting_scale),
        (_SENSORS, normalization.sensor_mean[nearest], normalization.sensor_scale[nearest]),
    )
    columns = [
        np.where(scale > 0, rows[:, part] - mean, 0.0) / np.where(scale > 0, scale, 1.0)
        for part, mean, scale in parts
    ]
    with np.errstate(over="ignore"):
        features = np.hstack(columns).astype(np.float32)
    bad = np.argwhere(~np.isfinite(features))
    if len(bad):
        engine, cycle = rows[bad[0, 0], :2]
        raise ValueError(
            f"{name} engine {engine:.0f}, cycle {cycle:.0f}, has a {_FEATURE_NAMES[bad[0, 1]]} "
            "that normalised is no finite float32; repair the value, or leave this engine out."
        )
    return features


def _scale(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviations, exactly 0 for a constant column, whose mean rounds."""
    return np.where(np.ptp(columns, axis=0) == 0, 0.0, columns.std(axis=0))
