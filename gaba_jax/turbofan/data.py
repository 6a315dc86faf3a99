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

import gzip
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

INFORMATIVE_SENSORS = (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)
"""The sensors, counted from 1, that are not constant in subset FD001."""

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

COLUMN_NAMES = (
    "engine",
    "cycle",
    *(f"setting_{number}" for number in range(1, 4)),
    *(f"sensor_{number}" for number in range(1, 22)),
)
"""The 26 columns of a table."""

SETTING_TOLERANCES = (1.0, 0.05, 1.0)
"""Largest gap within one operating condition: 1000 ft, Mach number, degrees."""

_SETTINGS = slice(2, 5)
_SENSORS = [4 + sensor for sensor in INFORMATIVE_SENSORS]
_LARGEST_ENGINE = np.iinfo(np.int32).max

Where = Callable[[int], str]
"""Says in words where a row, counted from 0, came from."""


class Fleet(NamedTuple):
    """The three tables of one subset.

    Attributes:
        train: Runs to failure, [rows, 26].
        test: Runs cut off before the failure, [rows, 26].
        test_rul: RUL of each test engine after its last row, in cycles, [test engines].
    """

    train: NDArray[np.float64]
    test: NDArray[np.float64]
    test_rul: NDArray[np.float64]


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
        folder: Holds ``train_<subset>.txt``, ``test_<subset>.txt`` and ``RUL_<subset>.txt``,
            each plain or with ``.gz`` appended; where both are there, the plain one is read.
        subset: ``"FD001"`` to ``"FD004"``, or whatever the files are named.
        window: As in :func:`prepare`, as are all that follow.
        stride: Cycles between the ends of two windows.
        sensors_only: Leave the settings out of the features.
        validation_fraction: Share of the training engines that is held out.
        seed: Chooses the validation engines.
        max_rul: Cap of the RUL target, in cycles.

    Returns:
        The training, validation and test split.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is malformed (see :func:`read_table`, :func:`read_rul`), or an argument
            is (see :func:`prepare`).

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
    is what the fleet's ``test_rul`` says. An engine that is shorter than a window is padded at
    the front with copies of its first row. The last cycle of every engine ends a window, whatever
    the stride.

    Args:
        fleet: The tables.
        window: Cycles in a window, at least 1. Defaults to 30.
        stride: Cycles between the ends of two training or validation windows, at least 1.
            Defaults to 1.
        sensors_only: Use the 14 sensors without the 3 settings. Defaults to False, 17 features.
        validation_fraction: Share of the training engines that is held out, in [0, 1), rounded to
            whole engines and at least one unless it is 0. Defaults to 0.2.
        seed: Chooses the validation engines. Defaults to 0.
        max_rul: Cap of the RUL target, in cycles, positive. Defaults to 125.

    Returns:
        The training, validation and test split, with the statistics of the training engines.

    Raises:
        ValueError: A table or an argument breaks its rule, or an engine flies in an operating
            condition that no training engine has seen.

    Examples:
        >>> from gaba_jax.turbofan import simulator
        >>> engines = prepare(simulator.simulate(num_train=5, num_test=2), sensors_only=True)
        >>> engines.test.windows.shape
        (2, 30, 14)
        >>> sorted(set(engines.validation.engine.tolist()) & set(engines.train.engine.tolist()))
        []
    """
    if window < 1:
        raise ValueError(f"{window=} must be at least 1 cycle.")
    if stride < 1:
        raise ValueError(f"{stride=} must be at least 1 cycle.")
    if not 0.0 < max_rul < np.inf:
        raise ValueError(f"{max_rul=} must be a positive number of cycles.")
    check_fleet(fleet)
    held_out = _validation_engines(np.unique(fleet.train[:, 0]), validation_fraction, seed)
    is_validation = np.isin(fleet.train[:, 0], held_out)
    train_rows, validation_rows = fleet.train[~is_validation], fleet.train[is_validation]
    normalization = fit_normalization(train_rows)

    def split(rows: NDArray[np.float64], name: str, rul: NDArray[np.float64] | None) -> Split:
        features = normalize(rows, normalization, sensors_only=sensors_only, name=name)
        first, last = _first_and_last_rows(rows)
        if rul is None:
            ends = np.flatnonzero((last - np.arange(len(rows))) % stride == 0)
            left = (last - np.arange(len(rows)))[ends].astype(np.float64)
        else:
            ends, left = np.unique(last), rul
        steps = np.arange(1 - window, 1)
        members = np.maximum(ends[:, None] + steps, first[ends][:, None])
        capped = np.minimum(left, max_rul)
        return Split(
            windows=features[members],
            rul=capped.astype(np.float32),
            health=health_from_rul(capped),
            engine=rows[ends, 0].astype(np.int32),
            rul_uncapped=left.astype(np.float32),
        )

    return TurbofanData(
        train=split(train_rows, "training", None),
        validation=split(validation_rows, "validation", None),
        test=split(fleet.test, "test", fleet.test_rul),
        feature_names=(
            *(() if sensors_only else COLUMN_NAMES[_SETTINGS]),
            *(COLUMN_NAMES[column] for column in _SENSORS),
        ),
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
    below = (cycles <= NORMAL_ABOVE).astype(np.int32)
    return below + (cycles <= CRITICAL_UP_TO).astype(np.int32)


def fit_normalization(rows: NDArray[np.float64]) -> Normalization:
    """Find the operating conditions of a table and its statistics in each.

    The values of each setting are sorted and cut where neighbours lie further apart than
    :data:`SETTING_TOLERANCES`; a condition is a combination of the three groups. This has no
    random start, does not depend on the order of the rows, and finds one condition in FD001 and
    FD003 and six in FD002 and FD004.

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
    _check_shape(rows, "rows", least=1)
    settings, sensors = rows[:, _SETTINGS], rows[:, _SENSORS]
    groups = [
        _group(setting, tolerance)
        for setting, tolerance in zip(settings.T, SETTING_TOLERANCES, strict=True)
    ]
    combinations, of_row = np.unique(np.stack(groups, axis=1), axis=0, return_inverse=True)
    members = [of_row.reshape(-1) == condition for condition in range(len(combinations))]
    return Normalization(
        conditions=np.stack([[settings[m].min(axis=0), settings[m].max(axis=0)] for m in members]),
        setting_mean=settings.mean(axis=0),
        setting_scale=_scale(settings),
        sensor_mean=np.stack([sensors[m].mean(axis=0) for m in members]),
        sensor_scale=np.stack([_scale(sensors[m]) for m in members]),
    )


def normalize(
    rows: NDArray[np.float64],
    normalization: Normalization,
    *,
    sensors_only: bool = False,
    name: str = "new",
) -> NDArray[np.float32]:
    r"""Turn a table into features.

    .. math::
        z = (x - \mu) / \sigma

    with the mean and the standard deviation over all training rows for a setting, over those of
    the row's operating condition for a sensor. A column that was constant there becomes 0.

    Args:
        rows: The table, [rows, 26].
        normalization: Statistics of the training engines, from :func:`fit_normalization`.
        sensors_only: Leave the settings out. Defaults to False.
        name: What to call these engines in an error. Defaults to ``"new"``.

    Returns:
        The features, float32 [rows, 17], or [rows, 14] for the sensors alone.

    Raises:
        ValueError: There are not 26 columns, or an engine flies in an operating condition that no
            training engine has seen.

    Examples:
        >>> from gaba_jax.turbofan import simulator
        >>> fleet = simulator.simulate(num_train=2, num_test=1)
        >>> features = normalize(fleet.train, fit_normalization(fleet.train))
        >>> features.shape[1], bool(abs(features.mean()) < 1e-6)
        (17, True)
    """
    _check_shape(rows, "rows", least=0)
    condition = _conditions_of_rows(rows, normalization.conditions, name)
    sensors = _standardize(
        rows[:, _SENSORS],
        normalization.sensor_mean[condition],
        normalization.sensor_scale[condition],
    )
    if sensors_only:
        return sensors
    settings = _standardize(
        rows[:, _SETTINGS], normalization.setting_mean, normalization.setting_scale
    )
    return np.concatenate([settings, sensors], axis=1)


def read_fleet(folder: str | Path, subset: str = "FD001") -> Fleet:
    """Read the three files of one subset.

    Args:
        folder: Holds the files, plain or with ``.gz`` appended.
        subset: The files' common name. Defaults to ``"FD001"``.

    Returns:
        The tables, checked.

    Raises:
        FileNotFoundError: The folder or a file is missing.
        ValueError: A file is malformed; the message has its name and the line.

    Examples:
        >>> read_fleet("no_such_folder")
        Traceback (most recent call last):
        ...
        FileNotFoundError: folder no_such_folder does not exist; ...
    """
    train = read_table(_find(folder, f"train_{subset}.txt"))
    test = read_table(_find(folder, f"test_{subset}.txt"))
    rul = read_rul(_find(folder, f"RUL_{subset}.txt"), len(np.unique(test[:, 0])))
    return Fleet(train, test, rul)


def read_table(path: str | Path) -> NDArray[np.float64]:
    """Read one ``train_`` or ``test_`` file.

    Columns are separated by white space; trailing spaces and empty lines are ignored. Each
    engine's rows form one block, with the cycles 1, 2, 3 and so on.

    Args:
        path: The file; one whose name ends in ``.gz`` is unpacked.

    Returns:
        The rows in the order of the file, [rows, 26].

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is empty, or a line has a wrong number of columns, a field that is no
            finite number, an engine or cycle that is no whole number, or breaks the order of the
            cycles; the message has the file and the line.

    Examples:
        >>> import tempfile
        >>> from gaba_jax.turbofan import simulator
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     simulator.write(simulator.simulate(num_train=2, num_test=1), folder)
        ...     rows = read_table(folder + "/train_FD001.txt")
        >>> rows[:2, :2].tolist()
        [[1.0, 1.0], [1.0, 2.0]]
    """
    rows, where = _read_numbers(path, COLUMN_NAMES)
    _check_rows(rows, where)
    return rows


def read_rul(path: str | Path, num_engines: int) -> NDArray[np.float64]:
    r"""Read one ``RUL_`` file.

    Args:
        path: The file; one whose name ends in ``.gz`` is unpacked.
        num_engines: Engines in the test file, which the values belong to in their order there.

    Returns:
        The RUL of each test engine, in cycles, [num_engines].

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file does not hold one non-negative number per test engine; the message
            has the file and the line.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "RUL_FD001.txt")
        ...     _ = path.write_text("112 \n98 \n")
        ...     read_rul(path, num_engines=2).tolist()
        [112.0, 98.0]
    """
    rows, where = _read_numbers(path, ("RUL",))
    rul = rows[:, 0]
    _check_rul(rul, num_engines, where)
    return rul


def check_fleet(fleet: Fleet) -> None:
    """Check tables as the reader checks files.

    Args:
        fleet: The tables.

    Raises:
        ValueError: A table breaks a rule of :func:`read_table`, or ``test_rul`` one of
            :func:`read_rul`; the message has the table and the row, counted from 0.

    Examples:
        >>> import numpy as np
        >>> check_fleet(Fleet(np.zeros((3, 25)), np.zeros((3, 26)), np.zeros(1)))
        Traceback (most recent call last):
        ...
        ValueError: train must be [rows, 26] with at least one row (engine, ...), got (3, 25).
    """
    for name, rows in (("train", fleet.train), ("test", fleet.test)):
        _check_shape(rows, name, least=1)
        where = _row_of(name)
        _check_finite(rows, COLUMN_NAMES, where)
        _check_rows(rows, where)
    if fleet.test_rul.ndim != 1:
        raise ValueError(f"test_rul must be [test engines], got {fleet.test_rul.shape}.")
    where = _row_of("test_rul")
    _check_finite(fleet.test_rul[:, None], ("RUL",), where)
    _check_rul(fleet.test_rul, len(np.unique(fleet.test[:, 0])), where)


def _check_shape(rows: NDArray[np.float64], name: str, *, least: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != len(COLUMN_NAMES) or len(rows) < least:
        wanted = "[rows, 26] with at least one row" if least else "[rows, 26]"
        raise ValueError(
            f"{name} must be {wanted} (engine, cycle, 3 settings, 21 sensors), got {rows.shape}."
        )


def _row_of(name: str) -> Where:
    return lambda row: f"{name}, row {row}"


def _find(folder: str | Path, name: str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder {folder} does not exist; pass the one that holds the C-MAPSS text files."
        )
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    kind = name.split("_")[0]
    there = sorted({path.name for path in folder.glob(f"{kind}_*.txt*")})
    raise FileNotFoundError(
        f"{folder / name} is missing, and so is {name}.gz; there is {', '.join(there) or 'none'}. "
        "Choose another subset or folder, or get the missing file."
    )


def _read_numbers(path: str | Path, columns: tuple[str, ...]) -> tuple[NDArray[np.float64], Where]:
    """Read finite numbers, [rows, columns], and a function that names a row's line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; check the folder and the name.")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no valid gzip file ({error}); get it anew.") from error
    # Bytes that are no text become a field that is no number, and so an error with its line.
    with io.StringIO(raw.decode("utf-8-sig", errors="replace"), newline=None) as text:
        lines = text.read().split("\n")
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path}, line 1: the file is empty, expected {_expected(columns)}.")
    try:
        rows = np.loadtxt(lines, dtype=np.float64, comments=None, ndmin=2)
    except ValueError as error:
        rows, reason = np.empty((0, 0)), error
    else:
        reason = None
    if rows.shape[1] != len(columns):
        _raise_first_bad_line(path, lines, columns)
        raise ValueError(f"{path}: {reason}; expected {_expected(columns)}.")

    def where(row: int) -> str:
        filled = [number for number, line in enumerate(lines, start=1) if line.strip()]
        return f"{path}, line {filled[row] if row < len(filled) else filled[-1] + 1}"

    _check_finite(rows, columns, where)
    return rows, where


def _expected(columns: tuple[str, ...]) -> str:
    return f"{len(columns)} numbers a line" if len(columns) > 1 else "one number a line"


def _raise_first_bad_line(path: Path, lines: list[str], columns: tuple[str, ...]) -> None:
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if fields and len(fields) != len(columns):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} columns, expected {_expected(columns)} "
                "separated by spaces; repair or remove the line."
            )
        for name, field in zip(columns, fields, strict=False):
            # float takes more than numpy's reader does: digits of other scripts, underscores.
            if not _is_number(field):
                raise ValueError(
                    f"{path}, line {number}: {name} is {field!r}, expected a number; "
                    "repair or remove the line."
                )


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return field.isascii() and "_" not in field


def _check_finite(rows: NDArray[np.float64], columns: tuple[str, ...], where: Where) -> None:
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        row, column = (int(index) for index in bad[0])
        raise ValueError(
            f"{where(row)}: {columns[column]} is {rows[row, column]}, expected a finite number; "
            "repair the value or remove the engine."
        )


def _check_rows(rows: NDArray[np.float64], where: Where) -> None:
    """Whole engine and cycle numbers, engines in blocks, cycles 1, 2, 3 and so on."""
    for name, column in zip(COLUMN_NAMES, rows.T[:2], strict=False):
        bad = np.flatnonzero(
            (column != np.floor(column)) | (column < 0) | (column > _LARGEST_ENGINE)
        )
        if len(bad):
            raise ValueError(
                f"{where(int(bad[0]))}: {name} is {column[bad[0]]:.15g}, expected a whole number "
                f"from 0 to {_LARGEST_ENGINE}; check that the columns are in their order."
            )
    starts = np.flatnonzero(np.diff(rows[:, 0], prepend=np.nan) != 0)
    repeated = np.setdiff1d(
        np.arange(len(starts)), np.unique(rows[starts, 0], return_index=True)[1]
    )
    if len(repeated):
        row = int(starts[repeated[0]])
        raise ValueError(
            f"{where(row)}: engine {rows[row, 0]:.0f} comes a second time, expected each engine's "
            "rows in one block; sort the rows by engine and cycle."
        )
    first, _ = _first_and_last_rows(rows)
    expected = np.arange(len(rows)) - first + 1
    bad = np.flatnonzero(rows[:, 1] != expected)
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"{where(row)}: engine {rows[row, 0]:.0f} has cycle {rows[row, 1]:.0f}, expected cycle "
            f"{expected[row]}, since cycles run 1, 2, 3, ... without a gap; add the missing rows, "
            "or number the cycles anew."
        )


def _check_rul(rul: NDArray[np.float64], num_engines: int, where: Where) -> None:
    if len(rul) != num_engines:
        raise ValueError(
            f"{where(min(len(rul), num_engines))}: {len(rul)} values in all, expected "
            f"{num_engines}, one for each test engine; check that the RUL and the test table "
            "belong together."
        )
    bad = np.flatnonzero(rul < 0)
    if len(bad):
        raise ValueError(
            f"{where(int(bad[0]))}: RUL is {rul[bad[0]]:g}, expected a number of cycles that is "
            "not negative; repair the value."
        )


def _first_and_last_rows(
    rows: NDArray[np.float64],
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """For each row, the indices of its engine's first and last row, [rows] each."""
    _, first, of_row, counts = np.unique(
        rows[:, 0], return_index=True, return_inverse=True, return_counts=True
    )
    return first[of_row], (first + counts - 1)[of_row]


def _validation_engines(
    engines: NDArray[np.float64], fraction: float, seed: int
) -> NDArray[np.float64]:
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"validation_fraction={fraction} must be in [0, 1).")
    count = max(1, round(fraction * len(engines))) if fraction else 0
    if count >= len(engines):
        raise ValueError(
            f"validation_fraction={fraction} holds out {count} of {len(engines)} training "
            "engines, which leaves none to train on; pass a smaller one, or more engines."
        )
    return np.random.default_rng(seed).permutation(engines)[:count]


def _group(setting: NDArray[np.float64], tolerance: float) -> NDArray[np.intp]:
    """Number the groups of values that no gap wider than the tolerance separates, [rows]."""
    values, of_row = np.unique(setting, return_inverse=True)
    return np.cumsum(np.diff(values, prepend=values[0]) > tolerance, dtype=np.intp)[of_row]


def _scale(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviations, exactly 0 for a constant column, whose mean rounds."""
    return np.where(np.ptp(columns, axis=0) == 0, 0.0, columns.std(axis=0))


def _standardize(
    columns: NDArray[np.float64], mean: NDArray[np.float64], scale: NDArray[np.float64]
) -> NDArray[np.float32]:
    varies = scale > 0
    scores = np.where(varies, (columns - mean) / np.where(varies, scale, 1.0), 0.0)
    return scores.astype(np.float32)


def _conditions_of_rows(
    rows: NDArray[np.float64], conditions: NDArray[np.float64], name: str
) -> NDArray[np.intp]:
    """The nearest condition of each row, [rows]."""
    settings = rows[:, _SETTINGS]
    distance = np.stack(
        [
            (np.maximum(np.maximum(low - settings, settings - high), 0.0) / SETTING_TOLERANCES).max(
                axis=1
            )
            for low, high in conditions
        ],
        axis=1,
    )
    unseen = np.flatnonzero(distance.min(axis=1) > 1.0)
    if len(unseen):
        engine, cycle, *setting = (float(value) for value in rows[unseen[0], :5])
        seen = "; ".join(_describe(condition.mean(axis=0)) for condition in conditions)
        raise ValueError(
            f"{name} engine {engine:.0f}, cycle {cycle:.0f}, flies in the operating condition "
            f"{_describe(setting)}, which no training engine has seen (they have seen {seen}); "
            "train on engines that fly there, hold out fewer or other ones for validation "
            "(validation_fraction, seed), or leave this engine out."
        )
    return distance.argmin(axis=1)


def _describe(setting: ArrayLike) -> str:
    altitude, mach, throttle = np.asarray(setting, np.float64).tolist()
    return f"(altitude {altitude:.1f}, Mach {mach:.2f}, throttle {throttle:.1f})"
