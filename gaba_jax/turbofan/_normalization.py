"""The features of a table: settings over all rows, sensors per operating condition."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gaba_jax.turbofan._cmapss_reader import COLUMN_NAMES, INFORMATIVE_SENSORS, check_shape

SETTING_TOLERANCES = (1.0, 0.05, 1.0)
"""Largest gap within one operating condition: 1000 ft, Mach number, degrees."""

_SETTINGS = slice(2, 5)
_SENSORS = [4 + sensor for sensor in INFORMATIVE_SENSORS]
FEATURE_NAMES = (*COLUMN_NAMES[_SETTINGS], *(COLUMN_NAMES[column] for column in _SENSORS))
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


class Standardization(NamedTuple):
    """One mean and one scale for each feature; a scale of 0 marks a constant one, which becomes 0.

    Attributes:
        mean: Mean over the rows of the training engines, [F].
        scale: Standard deviation over the same rows, [F].
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]


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
            f"{name} engine {engine:.0f}, cycle {cycle:.0f}, has a {FEATURE_NAMES[bad[0, 1]]} "
            "that normalised is no finite float32; repair the value, or leave this engine out."
        )
    return features


def _scale(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviations, exactly 0 for a constant column, whose mean rounds."""
    return np.where(np.ptp(columns, axis=0) == 0, 0.0, columns.std(axis=0))
