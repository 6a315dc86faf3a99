"""Mutated C-MAPSS files: read to the numbers in them, or refused with the file and the line."""

import codecs
import contextlib
import functools
import gzip
import re
import signal
import tempfile
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gaba_jax.turbofan import data, simulator
from tests.soak import SOAK

EXAMPLES = 2000 if SOAK else 300
SECONDS = 20
BYTES = 10**9
TRAIN, TEST, RUL = NAMES = ("train_FD001.txt", "test_FD001.txt", "RUL_FD001.txt")
LARGEST = float(np.finfo(np.float32).max)

Change = Callable[[bytes, int, bytes], bytes]  # a content, a place there, some bytes
Mutation = tuple[str, int, bytes]  # the name of a change, and its place and bytes


@functools.cache
def valid() -> MappingProxyType[str, bytes]:
    """The three files of five engines that flew 3 to 6 cycles."""
    whole = simulator.simulate(num_train=3, num_test=2)
    tables = data.Fleet(
        train=np.concatenate([whole.train[whole.train[:, 0] == n][: 3 + n] for n in (1, 2, 3)]),
        test=np.concatenate([whole.test[whole.test[:, 0] == n][: 2 + n] for n in (1, 2)]),
        test_rul=whole.test_rul,
    )
    with tempfile.TemporaryDirectory() as folder:
        simulator.write(tables, folder)
        return MappingProxyType({name: Path(folder, name).read_bytes() for name in NAMES})


def replaced(name: str, content: bytes, *, packed: bool = False) -> dict[str, bytes]:
    """The valid files, in the order of reading, but for one."""
    files = dict(valid()) | {name: content}
    return {f"{n}.gz" if packed and n == name else n: files[n] for n in NAMES}


def save(files: dict[str, bytes], folder: str | Path) -> None:
    for name, content in files.items():
        Path(folder, name).write_bytes(content)


# Mutations of bytes, of lines, of fields and of the whole file.


def on_bytes(change: Callable[[bytes, bytes, bytes], bytes]) -> Change:
    """A change between what is before the place and what is behind it."""

    def mutate(content: bytes, at: int, some: bytes) -> bytes:
        at %= len(content) + 1
        return change(content[:at], some, content[at:])

    return mutate


def on_lines(change: Callable[[list[bytes], bytes], list[bytes]]) -> Change:
    """A change of the line at the place and the next one."""

    def mutate(content: bytes, at: int, some: bytes) -> bytes:
        lines = content.split(b"\n")
        at %= len(lines)
        return b"\n".join(lines[:at] + change(lines[at : at + 2], some) + lines[at + 2 :])

    return mutate


def on_fields(change: Callable[[list[bytes], int, bytes], list[bytes]]) -> Change:
    """A change of the fields of one line, where the place is one of them."""

    def mutate(content: bytes, at: int, some: bytes) -> bytes:
        lines = content.split(b"\n")
        field, line = divmod(at, len(lines))
        fields = lines[line].split() or [b""]
        lines[line] = b" ".join(change(fields, field % len(fields), some))
        return b"\n".join(lines)

    return mutate


def remove_the_rest(content: bytes, at: int, _: bytes) -> bytes:
    lines = content.split(b"\n")
    return b"\n".join(lines[: at % len(lines)])


def renumber(content: bytes, at: int, some: bytes) -> bytes:
    """Another number for the engine of a line, in all its lines."""
    lines = [line.partition(b" ") for line in content.split(b"\n")]
    old = lines[at % len(lines)][0]
    return b"\n".join((some if engine == old else engine) + b + c for engine, b, c in lines)


def move_to_the_end(content: bytes, at: int, _: bytes) -> bytes:
    """From a line on, those of the same engine go to the end."""
    lines = content.split(b"\n")
    engines = [line.split(b" ")[0] for line in lines]
    at %= len(lines)
    stop = next((i for i in range(at, len(lines)) if engines[i] != engines[at]), at)
    return b"\n".join(lines[:at] + lines[stop:-1] + lines[at:stop] + lines[-1:])


ON_BYTES = {
    "flip a bit": on_bytes(lambda a, b, c: a + bytes(i ^ 1 << len(b) % 8 for i in c[:1]) + c[1:]),
    "insert": on_bytes(lambda a, b, c: a + b + c),
    "overwrite": on_bytes(lambda a, b, c: a + b + c[len(b) :]),
    "delete": on_bytes(lambda a, b, c: a + c[len(b) :]),
    "truncate": on_bytes(lambda a, b, c: a),
    "append": on_bytes(lambda a, b, c: a + c + b),
}
ON_LINES = {
    "duplicate line": on_lines(lambda pair, _: pair[:1] + pair),
    "swap lines": on_lines(lambda pair, _: pair[::-1]),
    "remove line": on_lines(lambda pair, _: pair[1:]),
    "cut line": on_lines(lambda pair, _: [pair[0][: len(pair[0]) // 2], *pair[1:]]),
    "join lines": on_lines(lambda pair, _: [b"".join(pair)]),
    "insert line": on_lines(lambda pair, some: [some, *pair]),
    "remove the rest": remove_the_rest,
    "renumber engine": renumber,
    "move to the end": move_to_the_end,
}
ON_FIELDS = {
    "replace field": on_fields(lambda fields, at, b: [*fields[:at], b, *fields[at + 1 :]]),
    "replace engine": on_fields(lambda fields, _, b: [b, *fields[1:]]),
    "replace cycle": on_fields(lambda fields, _, b: [*fields[:1], b, *fields[2:]]),
    "insert field": on_fields(lambda fields, at, b: [*fields[:at], b, *fields[at:]]),
    "drop field": on_fields(lambda fields, at, _: fields[:at] + fields[at + 1 :]),
}
ON_ALL: dict[str, Change] = {
    "CRLF": lambda c, _, __: c.replace(b"\n", b"\r\n"),
    "CR": lambda c, _, __: c.replace(b"\n", b"\r"),
    "tabs": lambda c, _, __: c.replace(b" ", b"\t"),
    "other separator": lambda c, _, some: c.replace(b" ", some),
    "trailing bytes": lambda c, _, some: c.replace(b"\n", some + b"\n"),
    "no trailing blanks": lambda c, _, __: c.replace(b" \n", b"\n"),
    "blank lines": lambda c, _, __: c.replace(b"\n", b"\n \n"),
    "byte order mark": lambda c, _, __: b"\xef\xbb\xbf" + c,
    "UTF-16": lambda c, _, __: c.decode("latin-1").encode("utf-16"),
    "twice": lambda c, _, __: c + c,
    "empty": lambda c, _, __: b"",
}
MUTATIONS = ON_BYTES | ON_LINES | ON_FIELDS | ON_ALL

FIELDS = """
    nan -nan inf -Infinity 1e999 -1e999 1e300 1e39 3.4028235e38 3.4028236e38 1e-310 1e-400 0x10
    0x1p3 -- - + . e5 .5 1E+5 1_0 1d5 1,5 1j True None # #1 // 1#2 " "1" '1' µ 1µ µ1 ½ ² \u0663
    \uff11 \u2212 \u22121 \ufeff 1\ufeff \xff 1\x00 1\x002
"""
WHOLE = "-3 -1 -0 0 +1 1 02 2 3 4 5. 7 9 1e1 1.5 2147483647 2147483648 1000000000 3000000000"
BLANKS = ",  ,\t ,\n,\n\n,\r,\v,\f,\x00,\x1a,\x1c,\x1f,\x85,\xa0,\u2003,\u2028,\u200b,1\x852,#,# 1"
NUMBERS = WHOLE.split()
ODD = [*FIELDS.split(), "9" * 400, f"0.{0:0400}1", "x" * 5000]
BLANK = [*BLANKS.split(","), "1 " * 3000, " " * 5000]


def mutation(changes: dict[str, Change], texts: Sequence[str]) -> st.SearchStrategy[Mutation]:
    encoded = [text.encode() for text in texts] + [b"\xb5"]
    some = st.sampled_from(encoded) | st.binary(max_size=4)
    return st.tuples(st.sampled_from(list(changes)), st.integers(0, 10**4), some)


of_text = st.one_of(
    mutation(ON_BYTES, NUMBERS + ODD + BLANK),
    mutation(ON_LINES, NUMBERS),
    mutation(ON_FIELDS, NUMBERS),
    mutation(ON_FIELDS, ODD),
    mutation(ON_ALL, BLANK),
)
of_packed = mutation(ON_BYTES, ODD + BLANK)


def mutate(content: bytes, mutations: list[Mutation]) -> bytes:
    for name, at, some in mutations:
        content = MUTATIONS[name](content, at, some)
    return content


# The files read a second time, field by field, with nothing shared with the reader.

NUMBER = re.compile(
    r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.ASCII | re.IGNORECASE
)
Rows = dict[int, list[float]]  # by line, counted from 1
Wrong = dict[int, str]  # what is wrong, by line


def reference_rows(content: bytes, columns: int) -> tuple[Rows, Wrong]:
    if b"\xef\xbb\xbf".startswith(content):  # nothing but a byte order mark, or the start of one
        content = b""
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        text = content.decode("utf-16", errors="replace")
    else:
        text = content.decode("utf-8", errors="replace").removeprefix("\ufeff")
    rows: Rows = {}
    wrong: Wrong = {}
    for line, fields in enumerate(map(str.split, re.split("\r\n|\r|\n", text)), start=1):
        if not fields:
            continue
        rows[line] = [float(field) for field in fields if NUMBER.fullmatch(field)]
        if len(fields) != columns:
            wrong[line] = f"{len(fields)} columns, expected"
        elif len(rows[line]) != columns:
            wrong[line] = "expected a number"
        elif not all(abs(value) <= LARGEST for value in rows[line]):
            wrong[line] = "expected a finite number"
    return rows, wrong if rows else {1: "the file is empty"}


def reference_table(content: bytes) -> tuple[Rows, Wrong]:
    rows, wrong = reference_rows(content, 26)
    if wrong:
        return rows, wrong
    for line, row in rows.items():
        for name, value in zip(("cycle", "engine"), (row[1], row[0]), strict=True):
            if not (value.is_integer() and 0 <= value < 2**31):
                wrong[line] = f"{name} is .* expected a whole number"
    if wrong:
        return rows, wrong
    lives: Counter[float] = Counter()
    current = None
    for line, (engine, cycle, *_) in rows.items():
        if engine != current and engine in lives:
            wrong[line] = "comes a second time"
            lives[engine] = 0
        current = engine
        lives[engine] += 1
        if cycle != lives[engine]:
            wrong.setdefault(line, "has cycle .* expected cycle")
    return rows, wrong


def reference_rul(content: bytes, engines: int) -> tuple[Rows, Wrong]:
    rows, wrong = reference_rows(content, 1)
    if not wrong:
        wrong = {line: "is not negative" for line, row in rows.items() if row[0] < 0}
        if len(rows) != engines:
            lines = [*rows, max(rows) + 1]
            wrong[lines[min(len(rows), engines)]] = f"{len(rows)} values in all, expected {engines}"
    return rows, wrong


def reference(files: dict[str, bytes]) -> tuple[list[Rows], str, Wrong | None]:
    """The rows of the files, then the first malformed one and what is wrong there.

    What is wrong is ``None`` where the file does not unpack.
    """
    tables: list[Rows] = []
    for name, content in files.items():
        if name.endswith(".gz"):
            try:
                content = gzip.decompress(content)
            except (gzip.BadGzipFile, EOFError, zlib.error):
                return tables, name, None
        if name.startswith("RUL"):
            rows, wrong = reference_rul(content, len({row[0] for row in tables[1].values()}))
        else:
            rows, wrong = reference_table(content)
        if wrong:
            return tables, name, wrong
        tables.append(rows)
    return tables, "", {}


# What came out.


@contextlib.contextmanager
def bounded() -> Generator[None, None, None]:
    """Fails what hangs or takes over a gigabyte."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(files: dict[str, bytes]) -> str:
    """Read and prepare a folder of files, check all of it, and say in words what came out."""
    tables, name, wrong = reference(files)
    with tempfile.TemporaryDirectory() as folder:
        save(files, folder)
        try:
            with bounded():
                fleet = data.read_fleet(folder)
        except ValueError as error:
            return refused(str(error), str(Path(folder, name)), wrong)
    assert wrong == {}, "read in spite of this"
    for rows, table in zip(fleet, tables, strict=True):
        expected = np.array(list(table.values()), np.float64)
        expected = expected if rows.ndim == 2 else expected[:, 0]
        np.testing.assert_array_equal(rows, expected, strict=True)
    return prepared(fleet)


def refused(message: str, path: str, wrong: Wrong | None) -> str:
    """The message has the file, a line and what is wrong there, and stays short."""
    assert wrong != {}, message
    assert len(message) < len(path) + 300
    if wrong is None:
        assert message.startswith(f"{path} is no valid gzip file (")
        return "no gzip"
    found = re.match(re.escape(path) + r", line (\d+): ", message)
    assert found, message
    line = int(found[1])
    assert line in wrong, message
    assert re.search(wrong[line], message), message
    # It is the first of the lines of which the same is wrong.
    assert line == min(other for other, what in wrong.items() if what == wrong[line])
    return re.sub(r"\d+|\.\*", "", wrong[line]).strip()


def prepared(fleet: data.Fleet) -> str:
    """What was read makes finite windows, or the engine that does not fit is named."""
    try:
        with bounded():
            engines = data.prepare(fleet, window=4)
    except ValueError as error:
        message = str(error)
    else:
        for split in (engines.train, engines.validation, engines.test):
            assert all(np.isfinite(array).all() for array in split)
        return "read"
    assert re.search(r"engine \d+, cycle \d+|leaves none to train on", message), message
    return "read, not prepared"


@pytest.mark.slow
def test_a_mutated_file_is_read_to_its_numbers_or_refused_by_line() -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES)
    @given(
        name=st.sampled_from(NAMES),
        text=st.lists(of_text, min_size=1, max_size=2),
        packed=st.sampled_from((False, False, True)),
        damage=st.lists(of_packed, max_size=1),
    )
    def check(name: str, text: list[Mutation], packed: bool, damage: list[Mutation]) -> None:
        content = mutate(valid()[name], text)
        assume(content != valid()[name])
        if packed:
            content = mutate(gzip.compress(content, mtime=0), damage)
        outcomes[outcome(replaced(name, content, packed=packed))] += 1

    check()
    # Both sides are tried, and more than one reason to refuse.
    assert outcomes["read"] >= EXAMPLES / 50
    assert {"columns, expected", "expected a number", "no gzip"} <= set(outcomes)


# Files that a loader may well stumble over.


@pytest.mark.parametrize(
    ("name", "mutations", "expected"),
    [
        (TRAIN, [("replace field", 16 * 12 + 3, b"1e300")], "expected a finite number"),
        (TEST, [("replace field", 16 * 12 + 3, b"3.5e38")], "expected a finite number"),
        (TEST, [("replace field", 8 * 12 + 3, b"3.4e38")], "read, not prepared"),
        (RUL, [("replace field", 1, b"1e39")], "expected a finite number"),
        (RUL, [("replace field", 1, b"3.4e38")], "read"),
        (RUL, [("replace field", 1, b"-1")], "is not negative"),
        (RUL, [("replace field", 1, "\u0663".encode())], "expected a number"),
        (TRAIN, [("replace field", 16 * 12 + 3, b"1_0")], "expected a number"),
        (TRAIN, [("replace field", 16 * 12 + 3, b"x" * 10**6)], "expected a number"),
        (TRAIN, [("append", 0, b"1 " * 10**6)], "columns, expected"),
        (TRAIN, [("append", 0, b"\n" * 10**6)], "read"),
        (TEST, [("renumber engine", 0, b"1000000000")], "read"),
        (TEST, [("replace cycle", 2, b"1000000000")], "has cycle  expected cycle"),
        (TEST, [("other separator", 0, "\u2003".encode())], "read"),
        (TRAIN, [("trailing bytes", 0, b"# 1")], "columns, expected"),
        (
            TRAIN,
            [("replace cycle", 2, b"9"), ("insert line", 0, b""), ("CRLF", 0, b"")],
            "has cycle  expected cycle",
        ),
        (TRAIN, [("CR", 0, b"")], "read"),
    ],
)
def test_a_file_has_this_outcome(name: str, mutations: list[Mutation], expected: str) -> None:
    assert outcome(replaced(name, mutate(valid()[name], mutations))) == expected


FLOODS = pytest.mark.parametrize(
    ("name", "piece"), [(TRAIN, b"0"), (TRAIN, b"\n"), (TEST, b"1 "), (RUL, b"1\n"), (RUL, b"\x00")]
)


@pytest.mark.slow
@FLOODS
def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, name: str, piece: bytes) -> None:
    bomb = gzip.compress(piece * (2**26 // len(piece))) * 20  # 1.3 GB in 1.3 MB
    save(replaced(name, bomb, packed=True), tmp_path)
    with bounded(), pytest.raises(ValueError, match=rf"{name}\.gz unpacks to more than \d+ bytes"):
        data.read_fleet(tmp_path)


@FLOODS
def test_what_is_unpacked_in_any_case_is_refused_by_line(
    tmp_path: Path, name: str, piece: bytes
) -> None:
    flood = gzip.compress(piece * (2**20 // len(piece)))
    save(replaced(name, flood, packed=True), tmp_path)
    with bounded(), pytest.raises(ValueError, match=rf"{name}\.gz, line \d+: "):
        data.read_fleet(tmp_path)


def test_a_table_of_constants_is_no_bomb(tmp_path: Path) -> None:
    cycles = np.arange(1, 301)
    lines = [f"{n} {cycle}" + " 1234.5678" * 24 for n in range(1, 21) for cycle in cycles]
    text = "\n".join(lines).encode()
    packed = gzip.compress(text)
    assert 60 * len(packed) < len(text) > 2**20
    (tmp_path / "train.txt.gz").write_bytes(packed)
    rows = data.read_table(tmp_path / "train.txt.gz")
    np.testing.assert_array_equal(rows[:, 1], np.tile(cycles, 20))
    assert (rows[:, 2:] == 1234.5678).all()
