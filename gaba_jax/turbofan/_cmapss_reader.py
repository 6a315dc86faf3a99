"""The C-MAPSS files: read into tables and checked, with errors that name the line."""

import codecs
import gzip
import io
import re
import reprlib
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

COLUMN_NAMES = (
    "engine",
    "cycle",
    *(f"setting_{number}" for number in range(1, 4)),
    *(f"sensor_{number}" for number in range(1, 22)),
)
"""The 26 columns of a table."""

INFORMATIVE_SENSORS = (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)
"""The sensors, counted from 1, that are not constant in subset FD001."""

_LARGEST_ENGINE = np.iinfo(np.int32).max
_LARGEST_VALUE = float(np.finfo(np.float32).max)  # features and targets are float32

# A file unpacks to the larger of so many bytes and so many times its size. Tables with constant
# columns reach 70 times; a gzip bomb some 1000.
_UNPACKED_BYTES = 2**20
_UNPACKED_TIMES = 200

_NAMED = re.compile(r"(train|test|RUL)_(\w+)\.txt(\.gz)?")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

# Says in words where a row, counted from 0, came from.
_Where = Callable[[int], str]


class _Member(NamedTuple):
    """A file within a zip archive."""

    archive: Path
    name: str

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


_Source = Path | _Member


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


def read_fleet(folder: str | Path, subset: str = "FD001") -> Fleet:
    """Read the three files of one subset.

    Args:
        folder: Holds ``train_<subset>.txt``, ``test_<subset>.txt`` and ``RUL_<subset>.txt``,
            each plain or with ``.gz`` appended; where both are there, the plain one is read. A zip
            archive that holds them, as the data is distributed, or a folder that holds such an
            archive, will do, and so will the path of one of the files.
        subset: The files' common name. Defaults to ``"FD001"``.

    Raises:
        FileNotFoundError: The folder or a file is missing.
        ValueError: A file is malformed; the message has its name and the line, where it has lines.
            Or the path is that of a file of another subset, or of something else.

    Examples:
        >>> read_fleet("no_such_folder")
        Traceback (most recent call last):
        ...
        FileNotFoundError: folder no_such_folder does not exist; ...
    """
    paths = find_fleet(folder, subset)
    train, test = (_read_table(path) for path in paths[:2])
    return Fleet(train, test, _read_rul(paths[2], len(np.unique(test[:, 0]))))


def find_fleet(folder: str | Path, subset: str) -> list[_Source]:
    """Where the three files of a subset are, for :func:`read_fleet`, which says what it raises."""
    folder = Path(folder)
    if folder.is_file() and not zipfile.is_zipfile(folder):
        named = _NAMED.fullmatch(folder.name)
        if named is None:
            raise ValueError(
                f"{folder} is a file that is neither one of the C-MAPSS text files, such as "
                f"train_{subset}.txt, nor a zip archive of them; pass one of these or their folder."
            )
        if named[2] != subset:
            raise ValueError(
                f"{folder} is a file of the subset {named[2]}, and subset={subset}: pass "
                f"subset={named[2]}, or the folder."
            )
        folder = folder.parent
    return [_find(folder, f"{kind}_{subset}.txt") for kind in ("train", "test", "RUL")]


def read_table(path: str | Path) -> NDArray[np.float64]:
    """Read one ``train_`` or ``test_`` file.

    Columns are separated by white space; trailing spaces and empty lines are ignored. Each
    engine's rows form one block, with the cycles 1, 2, 3 and so on.

    Args:
        path: The file; one whose name ends in ``.gz`` is unpacked. UTF-8, or UTF-16 with its mark.

    Returns:
        The rows in the order of the file, [rows, 26].

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is empty, or a line has a wrong number of columns, a field that is no
            finite float32, an engine or cycle that is no whole number, or breaks the order of the
            cycles; the message has the file and the line. A packed file is damaged, or unpacks to
            over 1 MiB and 200 times its size; the message has the file.

    Examples:
        >>> import tempfile
        >>> from gaba_jax.turbofan import simulator
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     simulator.write(simulator.simulate(num_train=2, num_test=1), folder)
        ...     rows = read_table(folder + "/train_FD001.txt")
        >>> rows[:2, :2].tolist()
        [[1.0, 1.0], [1.0, 2.0]]
    """
    return _read_table(Path(path))


def _read_table(path: _Source) -> NDArray[np.float64]:
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
            has the file and the line. A packed file breaks a rule of :func:`read_table`.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "RUL_FD001.txt")
        ...     _ = path.write_text("112 \n98 \n")
        ...     read_rul(path, num_engines=2).tolist()
        [112.0, 98.0]
    """
    return _read_rul(Path(path), num_engines)


def _read_rul(path: _Source, num_engines: int) -> NDArray[np.float64]:
    rows, where = _read_numbers(path, ("RUL",))
    _check_rul(rows[:, 0], num_engines, where)
    return rows[:, 0]


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
        check_shape(rows, name, least=1)
        _check_rows(rows, (name + ", row {}").format)
    if fleet.test_rul.ndim != 1:
        raise ValueError(f"test_rul must be [test engines], got {fleet.test_rul.shape}.")
    _check_rul(fleet.test_rul, len(np.unique(fleet.test[:, 0])), "test_rul, row {}".format)


def check_shape(rows: NDArray[np.float64], name: str, *, least: int) -> None:
    """Check that a table has 26 columns and not fewer rows than ``least``, 0 or 1."""
    if rows.ndim != 2 or rows.shape[1] != len(COLUMN_NAMES) or len(rows) < least:
        wanted = "[rows, 26] with at least one row" if least else "[rows, 26]"
        raise ValueError(
            f"{name} must be {wanted} (engine, cycle, 3 settings, 21 sensors), got {rows.shape}."
        )


def _find(folder: Path, name: str) -> _Source:
    if folder.is_dir():
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
        archives = sorted(path for path in folder.glob("*.zip") if path.is_file())
    elif folder.is_file():
        archives = [folder]
    else:
        raise FileNotFoundError(
            f"folder {folder} does not exist; pass the one that holds the C-MAPSS text files."
        )
    members = [_Member(archive, each) for archive in archives for each in _members(archive)]
    for wanted in (name, f"{name}.gz"):
        for member in members:
            if member.name.rpartition("/")[2] == wanted:
                return member
    kind = name.split("_")[0]
    files = [path.name for path in folder.glob(f"{kind}_*.txt*")] if folder.is_dir() else []
    files += [str(each) for each in members if each.name.rpartition("/")[2].startswith(f"{kind}_")]
    raise FileNotFoundError(
        f"{folder / name} is missing, and so is {name}.gz; there is "
        f"{', '.join(sorted(files)) or 'none'}. "
        "Choose another subset or folder, or get the missing file."
    )


def _members(archive: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as opened:
            return [name for name in opened.namelist() if not name.startswith("__MACOSX")]
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise ValueError(f"{archive} is no valid zip archive ({error}); get it anew.") from error


def _content(path: _Source) -> bytes:
    if isinstance(path, Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; check the folder and the name.")
        return _gunzip(path, path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        with zipfile.ZipFile(path.archive) as opened:
            packed = opened.getinfo(path.name).compress_size
            with opened.open(path.name) as file:
                content = _read_at_most(path, file, packed)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); get the archive anew.") from error
    return _gunzip(path, content) if path.name.endswith(".gz") else content


def _lines(content: bytes) -> list[str]:
    # Bytes that are no text become a field that is no number, and so an error with its line.
    encoding = "utf-16" if content.startswith(_UTF16) else "utf-8-sig"
    return io.TextIOWrapper(io.BytesIO(content), encoding=encoding, errors="replace").readlines()


def _read_numbers(path: _Source, columns: tuple[str, ...]) -> tuple[NDArray[np.float64], _Where]:
    """Read numbers, [rows, columns], and a function that names a row's line."""
    lines = _lines(_content(path))
    expected = f"expected {len(columns)} numbers a line"
    if len(columns) == 1:
        expected = "expected one number a line"
    filled = [number for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise ValueError(f"{path}, line 1: the file is empty, {expected}.")
    try:
        rows, reason = np.loadtxt(lines, dtype=np.float64, comments=None, ndmin=2), None
    except ValueError as error:
        rows, reason = np.empty((0, 0)), error
    if rows.shape[1] != len(columns):
        _raise_first_bad_line(path, lines, columns, expected)
        raise ValueError(f"{path}: {reason}; {expected}.")
    filled.append(filled[-1] + 1)  # where a missing row would be
    return rows, lambda row: f"{path}, line {filled[row]}"


def _gunzip(path: _Source, packed: bytes) -> bytes:
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            return _read_at_most(path, cast(IO[bytes], file), len(packed))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no valid gzip file ({error}); get it anew.") from error


def _read_at_most(path: _Source, file: IO[bytes], packed: int) -> bytes:
    limit = max(_UNPACKED_BYTES, _UNPACKED_TIMES * packed)
    content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(
            f"{path} unpacks to more than {limit} bytes, expected at most {_UNPACKED_BYTES} or "
            f"{_UNPACKED_TIMES} times its size; get it anew, or unpack it if that is what it holds."
        )
    return content


def _raise_first_bad_line(
    path: _Source, lines: list[str], columns: tuple[str, ...], expected: str
) -> None:
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if fields and len(fields) != len(columns):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} columns, {expected} separated by spaces; "
                "repair or remove the line."
            )
        for name, field in zip(columns, fields, strict=False):
            if not _is_number(field):
                raise ValueError(
                    f"{path}, line {number}: {name} is {reprlib.repr(field)}, expected a number; "
                    "repair or remove the line."
                )


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    # float takes more than numpy's reader does: digits of other scripts, underscores.
    return field.isascii() and "_" not in field


def _check_finite(rows: NDArray[np.float64], columns: tuple[str, ...], where: _Where) -> None:
    bad = np.argwhere(~(np.abs(rows) <= _LARGEST_VALUE))
    if len(bad):
        row, column = (int(index) for index in bad[0])
        raise ValueError(
            f"{where(row)}: {columns[column]} is {rows[row, column]}, expected a finite number "
            "that float32 holds; repair the value or remove the engine."
        )


def _check_rows(rows: NDArray[np.float64], where: _Where) -> None:
    """Finite values, whole engine and cycle numbers, engines in blocks, cycles 1, 2, 3, ..."""
    _check_finite(rows, COLUMN_NAMES, where)
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
    repeated = np.delete(starts, np.unique(rows[starts, 0], return_index=True)[1])
    if len(repeated):
        row = int(repeated[0])
        raise ValueError(
            f"{where(row)}: engine {rows[row, 0]:.0f} comes a second time, expected each engine's "
            "rows in one block; sort the rows by engine and cycle."
        )
    lengths = np.diff(starts, append=len(rows))
    expected = np.arange(len(rows)) - np.repeat(starts, lengths) + 1
    bad = np.flatnonzero(rows[:, 1] != expected)
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"{where(row)}: engine {rows[row, 0]:.0f} has cycle {rows[row, 1]:.0f}, expected cycle "
            f"{expected[row]}, since cycles run 1, 2, 3, ... without a gap; add the missing rows, "
            "or number the cycles anew."
        )


def _check_rul(rul: NDArray[np.float64], num_engines: int, where: _Where) -> None:
    _check_finite(rul[:, None], ("RUL",), where)
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
