"""NASA N-CMAPSS turbofan data: whole flights, second by second, streamed and cut into windows.

:func:`load` does it all from one HDF5 file, such as DS02 with its 6.5 million rows, and reads it in
chunks: what is in memory are the windows that it returns, one flight and one chunk.

A file has two parts, ``dev`` to train on and ``test``. Each has one row per second of flight in
four datasets: ``W`` (altitude, Mach number, throttle resolver angle, T2), ``X_s`` (14 sensors),
``A`` (unit, cycle, flight class Fc, health state hs) and ``Y``, the remaining useful life (RUL),
counted in flights. ``W_var``, ``X_s_var`` and ``A_var`` name the columns. What else a file holds,
the virtual sensors ``X_v`` and the health parameters ``T``, is not read.

``W`` and ``X_s`` are 18 inputs. The two others of the usual 20 are, here, the cycle (the number of
the flight) and Fc, both of which an operator knows before the flight. The cycle is the age of the
engine: where all engines live about as long, it tells much of the RUL, and ``auxiliary=("Fc",)``
leaves it out. The unit, which would name the engine, and hs, which is a label, are never inputs.
Others (the repository mohyunho/N-CMAPSS_DL) fill up to 20 with the virtual sensors T40 and P30,
which the simulator gives and no aircraft measures: results on the two sets of 20 do not compare.

References:
    Arias Chao, Kulkarni, Goebel, Fink, "Aircraft Engine Run-to-Failure Dataset under Real Flight
    Conditions for Prognostics and Diagnostics", Data 2021.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gaba_jax.turbofan._ncmapss_reader import Part, open_file, read_flight, read_part
from gaba_jax.turbofan.data import (
    Split,
    Standardization,
    TurbofanData,
    choose_held_out,
    health_from_rul,
)

__all__ = ["AUXILIARY", "CRITICAL_UP_TO", "MEMORY_LIMIT", "NORMAL_ABOVE", "WINDOW", "load"]

AUXILIARY = ("cycle", "Fc")
"""The columns of ``A`` that may be inputs."""

NORMAL_ABOVE = 40.0
"""An engine with more flights than this left is normal (class 0)."""

CRITICAL_UP_TO = 15.0
"""An engine with at most this many flights left is critical (class 2)."""

WINDOW = 50
"""Rows that the model sees at once."""

MEMORY_LIMIT = 1_500_000_000
"""Bytes that the windows of a file may take: with Python and the libraries it stays below 2 GB."""


class _Cut(NamedTuple):
    window: int
    stride: int
    downsample: int
    thresholds: tuple[float, float]  # of the health classes


def load(
    path: str | Path,
    *,
    window: int = WINDOW,
    stride: int = 10,
    downsample: int = 10,
    auxiliary: Sequence[str] = AUXILIARY,
    validation_fraction: float = 0.2,
    seed: int = 0,
    normal_above: float = NORMAL_ABOVE,
    critical_up_to: float = CRITICAL_UP_TO,
    memory_limit: float = MEMORY_LIMIT,
) -> TurbofanData:
    r"""Read one file and prepare it for a model.

    Of each flight the rows 0, d, 2d, ... are kept, with d = ``downsample``, and not means over d
    rows: that keeps transients sharp, and others subsample alike. A window lies within one flight,
    hence within one engine: from one flight to the next there is no record, and the RUL steps.
    Windows end at the last kept row of a flight and every ``stride`` rows before it; a flight
    shorter than a window gives one, padded at the front with copies of its first row. The features
    are

    .. math::
        z = (x - \mu) / \sigma

    with the mean and the standard deviation over the kept rows of the training engines, in double
    precision. There is no cap on the RUL: ``rul`` and ``rul_uncapped`` are the same.

    The windows take about ``rows / (downsample * stride) * window * inputs * 4`` bytes: 0.26 GB
    with the defaults and 6.5 million rows, ten times that with ``stride=1``, more than the limit.

    Args:
        path: The HDF5 file.
        window: Kept rows in a window, at least 1. Defaults to 50.
        stride: Kept rows between two windows, at least 1. Defaults to 10.
        downsample: Seconds between two kept rows, at least 1. Defaults to 10.
        auxiliary: Columns of ``A`` to append to the 18 of ``W`` and ``X_s``. Defaults to both of
            :data:`AUXILIARY`, 20 features.
        validation_fraction: Share of the dev engines that is held out, in [0, 1), rounded to
            whole engines and at least one unless it is 0. Defaults to 0.2.
        seed: Chooses the validation engines, at least 0. Defaults to 0.
        normal_above: More flights left than this are class 0. The default of 40 and that of
            ``critical_up_to`` give engines that live 60 to 90 flights all three classes.
        critical_up_to: At most so many flights left are class 2, less than ``normal_above``.
            Defaults to 15.
        memory_limit: Bytes that windows and one flight may take. Defaults to 1.5e9.

    Returns:
        The windows; ``test`` has those of **all** flights of the test engines, not one an engine.

    Raises:
        FileNotFoundError: The file is missing.
        ImportError: h5py is missing.
        ValueError: An option is out of range or needs more than ``memory_limit``, or the file is
            not HDF5, cut short or breaks the layout; the message has the dataset and the row.

    Examples:
        >>> import tempfile
        >>> import h5py
        >>> import numpy as np
        >>> names = {"W": "alt Mach TRA T2", "X_s": "T24 Nf", "A": "unit cycle Fc hs"}
        >>> flights = np.repeat(np.arange(1.0, 61.0), 100)  # 60 flights of 100 seconds
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with h5py.File(folder + "/small.h5", "w") as file:
        ...         for name, columns in names.items():
        ...             file[f"{name}_var"] = np.array(columns.split(), "S")
        ...         for part, units in {"dev": (2, 5), "test": (11,)}.items():
        ...             rows = [(unit, flight, 3, 1) for unit in units for flight in flights]
        ...             file[f"A_{part}"] = np.array(rows)
        ...             file[f"Y_{part}"] = 60 - file[f"A_{part}"][:, 1:2]
        ...             file[f"W_{part}"] = np.random.default_rng(0).normal(size=(len(rows), 4))
        ...             file[f"X_s_{part}"] = np.random.default_rng(1).normal(size=(len(rows), 2))
        ...     engines = load(folder + "/small.h5", downsample=1)
        >>> engines.train.windows.shape, engines.feature_names[4:]
        ((360, 50, 8), ('T24', 'Nf', 'cycle', 'Fc'))
    """
    for name, value in (("window", window), ("stride", stride), ("downsample", downsample)):
        if value < 1 or value % 1:
            raise ValueError(f"{name}={value} must be a whole number of at least 1.")
    auxiliary = tuple(auxiliary)
    if not set(auxiliary) <= set(AUXILIARY) or len(set(auxiliary)) < len(auxiliary):
        raise ValueError(f"{auxiliary=} must hold some of {AUXILIARY}, each once, or none: ().")
    if seed < 0:
        raise ValueError(f"{seed=} must be at least 0.")
    if not 0.0 <= critical_up_to < normal_above < np.inf:
        raise ValueError(
            f"{critical_up_to=} and {normal_above=} must be finite numbers of flights, the first "
            "at least 0 and below the second; exchange them, or pass others."
        )
    cut = _Cut(int(window), int(stride), int(downsample), (normal_above, critical_up_to))
    with open_file(path) as file:
        dev, test = (read_part(path, file, part, auxiliary) for part in ("dev", "test"))
        engines = np.unique(dev.flights[:, 0])
        try:
            held_out = choose_held_out(engines, validation_fraction, seed)
        except ValueError as error:
            raise ValueError(f"{dev.tables['A'].where}: {error}") from None
        is_validation = np.isin(dev.flights[:, 0], held_out)
        parts = (
            dev._replace(flights=dev.flights[~is_validation]),
            dev._replace(flights=dev.flights[is_validation]),
            test,
        )
        names = (*dev.tables["W"].names, *dev.tables["X_s"].names, *auxiliary)
        _check_memory(parts, cut, len(names), memory_limit)
        normalization = _fit(parts[0], cut, len(names))
        train, validation, tested = (_split(part, cut, names, normalization) for part in parts)
    return TurbofanData(
        train=train,
        validation=validation,
        test=tested,
        feature_names=names,
        normalization=normalization,
    )


def _shape(part: Part, cut: _Cut) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Kept rows and windows of each flight, [flights] each."""
    kept = -(-(part.flights[:, 2] - part.flights[:, 1]) // cut.downsample)
    return kept, np.maximum(kept - cut.window, 0) // cut.stride + 1


def _check_memory(parts: Sequence[Part], cut: _Cut, num_inputs: int, limit: float) -> None:
    shapes = [_shape(part, cut) for part in parts]
    num_windows = sum(int(windows.sum()) for _, windows in shapes)
    # Beside the windows, the longest flight: in chunks, joined, padded, and the one before it.
    longest = 4 * max(cut.window, *(int(kept.max(initial=0)) for kept, _ in shapes))
    needed = 4 * num_inputs * (num_windows * cut.window + longest)
    if needed > limit:
        raise ValueError(
            f"window={cut.window}, stride={cut.stride} and downsample={cut.downsample} make "
            f"{num_windows} windows of {num_inputs} features, {needed / 1e9:.3g} GB, more than "
            f"memory_limit={limit / 1e9:.3g} GB; pass a bigger stride or downsample, or a bigger "
            "memory_limit where there is the memory."
        )


def _fit(part: Part, cut: _Cut, num_inputs: int) -> Standardization:
    """Mean and standard deviation over the kept rows, merged chunk by chunk."""
    count = 0
    mean, squares = np.zeros(num_inputs), np.zeros(num_inputs)
    low, high = np.full(num_inputs, np.inf), np.full(num_inputs, -np.inf)
    for flight in part.flights:
        for rows, _ in read_flight(part, flight, cut.downsample):
            share = len(rows) / (count + len(rows))
            away = rows.mean(axis=0) - mean
            squares += ((rows - mean - away) ** 2).sum(axis=0) + away**2 * count * share
            mean += away * share
            count += len(rows)
            low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
    # Exactly 0 for a constant column, whose mean rounds.
    return Standardization(mean, np.where(low == high, 0.0, np.sqrt(squares / count)))


def _split(part: Part, cut: _Cut, names: Sequence[str], normalization: Standardization) -> Split:
    _, counts = _shape(part, cut)
    windows = np.empty((counts.sum(), cut.window, len(names)), np.float32)
    rul = np.empty(len(windows), np.float32)
    done = 0
    for flight, count in zip(part.flights, counts.tolist(), strict=True):
        chunks = [
            (_standardize(rows, normalization), target)
            for rows, target in read_flight(part, flight, cut.downsample)
        ]
        rows, target = (np.concatenate(column) for column in zip(*chunks, strict=True))
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=0))
        if len(bad):
            name = names[bad[0]]
            table = next(table for table in part.tables.values() if name in table.names)
            raise ValueError(
                f"{table.where}: unit {flight[0]} has a {name} that standardised is no finite "
                "float32, expected values like those of the training engines; repair the value, "
                "or remove the engine."
            )
        padded = np.pad(rows, ((max(cut.window - len(rows), 0), 0), (0, 0)), mode="edge")
        views = sliding_window_view(padded, cut.window, axis=0).swapaxes(1, 2)
        its = slice(done, done + count)
        windows[its] = views[(len(views) - 1) % cut.stride :: cut.stride]
        rul[its] = target[len(target) - 1 - (count - 1) * cut.stride :: cut.stride]
        done += count
    normal_above, critical_up_to = cut.thresholds
    return Split(
        windows=windows,
        rul=rul,
        health=health_from_rul(rul, normal_above=normal_above, critical_up_to=critical_up_to),
        engine=np.repeat(part.flights[:, 0], counts).astype(np.int32),
        rul_uncapped=rul,
    )


def _standardize(rows: NDArray[np.float64], normalization: Standardization) -> NDArray[np.float32]:
    mean, scale = normalization
    with np.errstate(over="ignore"):
        z = np.where(scale > 0, rows - mean, 0.0) / np.where(scale > 0, scale, 1.0)
        return z.astype(np.float32)
