"""The N-CMAPSS files: layout checked and read in chunks, with errors that name dataset and row."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CHUNK_ROWS = 2**14
"""Rows that are read at once."""

_LARGEST_ENGINE = np.iinfo(np.int32).max
_LARGEST_VALUE = float(np.finfo(np.float32).max)  # features and targets are float32


class Table(NamedTuple):
    """One dataset: what to call it in an error, the dataset of h5py, the names of its columns."""

    where: str
    dataset: Any
    names: tuple[str, ...]


class Part(NamedTuple):
    """``dev``, ``test`` or some flights of one.

    Attributes:
        tables: The datasets ``"W"``, ``"X_s"``, ``"A"`` and ``"Y"``.
        inputs: The names of the columns of each that are read; ``Y`` has one, the RUL.
        flights: Engine, first row and row after the last, in the file's order, [flights, 3].
    """

    tables: dict[str, Table]
    inputs: dict[str, tuple[str, ...]]
    flights: NDArray[np.int64]


def open_file(path: str | Path) -> Any:
    """The file, for reading; it is a context manager."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            'N-CMAPSS files need the package h5py. In a checkout: pip install -e ".[turbofan]"',
            name="h5py",
        ) from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; check the folder and the name.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        found = "is cut short or damaged" if h5py.is_hdf5(path) else "is not HDF5"
        raise ValueError(
            f"{path} {found} ({error}), expected an N-CMAPSS file in HDF5; get it anew."
        ) from error


def read_part(path: str | Path, file: Any, part: str, auxiliary: tuple[str, ...]) -> Part:
    """Check the layout of ``dev`` or ``test`` and find its flights."""
    tables: dict[str, Table] = {}
    for kind in ("W", "X_s", "A", "Y"):
        dataset = _dataset(path, file, f"{kind}_{part}", "fiu", 2)
        names, expected = ("RUL",), "one column, the RUL"
        if kind != "Y":
            variables = _dataset(path, file, f"{kind}_var", "SO", 1)
            expected = f"the {variables.shape[0]} that {kind}_var names"
            if dataset.shape[1] == variables.shape[0]:
                names = tuple(_decode(name) for name in variables[:])
        if dataset.shape[1] != len(names):
            raise ValueError(
                f"{path}, {kind}_{part}: {dataset.shape[1]} columns, expected {expected}; "
                "check that all datasets are of the same N-CMAPSS file."
            )
        tables[kind] = Table(f"{path}, {kind}_{part}", dataset, names)
    needed = dict.fromkeys(("unit", "cycle", *auxiliary))
    missing = [name for name in needed if name not in tables["A"].names]
    if missing:
        raise ValueError(
            f"{path}, A_var: names {', '.join(tables['A'].names)}, expected {', '.join(missing)} "
            "too; name the columns of A as NASA does."
        )
    counts = {f"{kind}_{part}": table.dataset.shape[0] for kind, table in tables.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"{path}: the rows are {found}, expected the same number in all four, at least 1; "
            "a shorter dataset was cut off: get the file anew."
        )
    inputs = {kind: table.names for kind, table in tables.items()} | {"A": auxiliary}
    return Part(tables, inputs, _find_flights(tables["A"]))


def read_flight(
    part: Part, flight: NDArray[np.int64], downsample: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Every ``downsample``-th row of a flight, chunk by chunk: inputs [rows, F] and RUL [rows]."""
    _, start, stop = (int(number) for number in flight)
    for first in range(start, stop, CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, stop)
        kept = slice((start - first) % downsample, None, downsample)
        rows = {k: _read(part.tables[k], first, last, names) for k, names in part.inputs.items()}
        rul = rows["Y"][:, 0]
        if rul.min() < 0:
            raise ValueError(
                f"{part.tables['Y'].where}, row {first + int(rul.argmin())}: RUL is {rul.min():g}, "
                "expected a number of flights that is not negative; repair the value."
            )
        if kept.start < len(rul):
            yield np.hstack([rows[kind][kept] for kind in ("W", "X_s", "A")]), rul[kept]


def _dataset(path: str | Path, file: Any, name: str, kinds: str, ndim: int) -> Any:
    dataset = file.get(name)
    dtype, shape = getattr(dataset, "dtype", None), getattr(dataset, "shape", None)
    expected = f"expected a {ndim}-dimensional dataset of {'numbers' if ndim == 2 else 'names'}"
    if dtype is None or shape is None:
        raise ValueError(
            f"{path}, {name}: there is no such dataset, only {', '.join(sorted(file)) or 'none'}; "
            f"{expected}; take an N-CMAPSS file, such as DS02, and get it anew if it is one."
        )
    if dtype.kind not in kinds or len(shape) != ndim:
        raise ValueError(
            f"{path}, {name}: shape {shape} of {dtype}, {expected}; write it as NASA's files do."
        )
    return dataset


def _decode(name: Any) -> str:
    return (name.decode(errors="replace") if isinstance(name, bytes) else str(name)).strip()


def _read(table: Table, first: int, last: int, names: Sequence[str]) -> NDArray[np.float64]:
    """The named columns of the rows from ``first`` to before ``last``, all finite."""
    try:
        rows = table.dataset[first:last]
    except OSError as error:
        raise ValueError(
            f"{table.where}, rows {first} to {last - 1}: cannot be read ({error}), expected "
            f"{table.dataset.shape[0]} whole rows; the dataset is cut short or damaged: get the "
            "file anew."
        ) from error
    values = np.asarray(rows[:, [table.names.index(name) for name in names]], np.float64)
    bad = np.argwhere(~(np.abs(values) <= _LARGEST_VALUE))
    if len(bad):
        row, column = (int(index) for index in bad[0])
        raise ValueError(
            f"{table.where}, row {first + row}: {names[column]} is {values[row, column]}, expected "
            "a finite number that float32 holds; repair the value, or remove the engine."
        )
    return values


def _find_flights(table: Table) -> NDArray[np.int64]:
    names, num_rows = ("unit", "cycle"), table.dataset.shape[0]
    found: list[NDArray[np.int64]] = []
    before = np.full((1, 2), -1.0)
    for first in range(0, num_rows, CHUNK_ROWS):
        rows = _read(table, first, min(first + CHUNK_ROWS, num_rows), names)
        bad = np.argwhere((rows != np.floor(rows)) | (rows < 0) | (rows > _LARGEST_ENGINE))
        if len(bad):
            row, column = (int(index) for index in bad[0])
            raise ValueError(
                f"{table.where}, row {first + row}: {names[column]} is {rows[row, column]:.15g}, "
                f"expected a whole number from 0 to {_LARGEST_ENGINE}; check that A_var names the "
                "columns in their order."
            )
        starts = np.flatnonzero((rows != np.concatenate([before, rows[:-1]])).any(axis=1))
        found.append(np.column_stack([rows[starts].astype(np.int64), starts + first]))
        before = rows[-1:]
    engine, cycle, start = np.concatenate(found).T
    same = np.diff(engine, prepend=-1) == 0
    blocks = np.flatnonzero(~same)
    again = np.delete(blocks, np.unique(engine[blocks], return_index=True)[1])
    if len(again):
        raise ValueError(
            f"{table.where}, row {start[again[0]]}: unit {engine[again[0]]} comes a second time, "
            "expected each engine's rows in one block; sort the rows by unit and cycle."
        )
    back = np.flatnonzero(same & (np.diff(cycle, prepend=0) < 0))
    if len(back):
        at = int(back[0])
        raise ValueError(
            f"{table.where}, row {start[at]}: unit {engine[at]} goes from cycle {cycle[at - 1]} "
            f"back to {cycle[at]}, expected ascending cycles; sort the rows by unit and cycle."
        )
    return np.column_stack([engine, start, np.append(start[1:], num_rows)])
