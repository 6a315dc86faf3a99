"""Reading, normalising and windowing of C-MAPSS tables."""

import gzip
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gaba_jax.turbofan import data

NAMES = ("train_FD001.txt", "test_FD001.txt", "RUL_FD001.txt")
SUBSETS = ("FD001", "FD002", "FD003", "FD004")
ALTITUDES = {1: [0], 6: [0, 10, 20, 25, 35, 42]}
CONDITIONS = {"FD001": 1, "FD002": 6, "FD003": 1, "FD004": 6}


def table(
    lives: dict[int, int], altitudes: tuple[float, ...] = (0.0,), seed: int = 0
) -> NDArray[np.float64]:
    """Engines with the given lives that fly at the given altitudes in turn, random otherwise."""
    generator = np.random.default_rng(seed)
    blocks: list[NDArray[np.float64]] = []
    for engine, life in lives.items():
        rows = generator.normal(size=(life, 26)).round(4)
        rows[:, 0] = engine
        rows[:, 1] = np.arange(1, life + 1)
        rows[:, 2] = [altitudes[cycle % len(altitudes)] for cycle in range(life)]
        rows[:, 3] = 0.0
        rows[:, 4] = 100.0
        blocks.append(rows)
    return np.concatenate(blocks)


def fleet(**changes: NDArray[np.float64]) -> data.Fleet:
    tables = data.Fleet(
        train=table({1: 40, 2: 10, 3: 35, 4: 50, 5: 33}),
        test=table({1: 31, 2: 5, 3: 45}, seed=1),
        test_rul=np.array([112.0, 200.0, 7.0]),
    )
    return tables._replace(**changes)


def save(tables: data.Fleet, folder: Path) -> Path:
    for name, rows in (("train", tables.train), ("test", tables.test)):
        lines = [" ".join(f"{value:.10g}" for value in row) + "  \n" for row in rows]
        (folder / f"{name}_FD001.txt").write_text("".join(lines))
    (folder / "RUL_FD001.txt").write_text("".join(f"{rul:g} \n" for rul in tables.test_rul))
    return folder


# The public data.


@pytest.mark.parametrize(
    ("subset", "train_rows", "train_engines", "test_rows", "test_engines", "shortest"),
    [
        ("FD001", 20631, 100, 13096, 100, 31),
        ("FD002", 53759, 260, 33991, 259, 21),
        ("FD003", 24720, 100, 16596, 100, 38),
        ("FD004", 61249, 249, 41214, 248, 19),
    ],
)
def test_public_tables_have_their_size(
    cmapss: Path,
    subset: str,
    train_rows: int,
    train_engines: int,
    test_rows: int,
    test_engines: int,
    shortest: int,
) -> None:
    tables = data.read_fleet(cmapss, subset)
    assert tables.train.shape == (train_rows, 26)
    assert tables.test.shape == (test_rows, 26)
    assert tables.test_rul.shape == (test_engines,)
    assert len(np.unique(tables.train[:, 0])) == train_engines
    runs = np.unique(tables.test[:, 0], return_counts=True)[1]
    assert (len(runs), runs.min()) == (test_engines, shortest)


@pytest.mark.parametrize("subset", SUBSETS)
def test_public_data_is_normalised_per_condition(cmapss: Path, subset: str) -> None:
    tables = data.read_fleet(cmapss, subset)
    engines = data.prepare(tables)
    altitudes = ALTITUDES[CONDITIONS[subset]]
    assert engines.normalization.conditions.mean(axis=1)[:, 0].round().tolist() == altitudes

    rows = tables.train[np.isin(tables.train[:, 0], engines.train.engine)]
    features = data.normalize(rows, engines.normalization).astype(np.float64)
    # The conditions, found a second time: their altitudes are whole numbers plus 0.009 at most.
    for altitude in altitudes:
        sensors = features[np.abs(rows[:, 2] - altitude) < 0.5, 3:]
        np.testing.assert_allclose(sensors.mean(axis=0), 0.0, atol=1e-6)
        np.testing.assert_allclose(sensors.std(axis=0), 1.0, rtol=1e-6)
    throttle_varies = float(CONDITIONS[subset] == 6)
    np.testing.assert_allclose(features[:, :3].mean(axis=0), 0.0, atol=1e-6)
    np.testing.assert_allclose(features[:, :3].std(axis=0), [1, 1, throttle_varies], rtol=1e-6)


def test_public_data_has_the_documented_shapes(cmapss: Path) -> None:
    engines = data.load(cmapss, "FD002", sensors_only=True, stride=7)
    assert engines.feature_names == tuple(f"sensor_{n}" for n in data.INFORMATIVE_SENSORS)
    assert engines.test.windows.shape == (259, 30, 14)
    assert len(np.unique(engines.validation.engine)) == 52
    assert len(np.unique(engines.train.engine)) == 208
    for split in (engines.train, engines.validation, engines.test):
        assert {len(array) for array in split} == {len(split.rul)}
        assert split.windows.shape[1:] == (30, 14)
        assert np.isfinite(split.windows).all()
        assert [array.dtype.name for array in split] == [
            "float32",
            "float32",
            "int32",
            "int32",
            "float32",
        ]
    assert engines.test.engine.tolist() == list(range(1, 260))
    assert engines.test.rul_uncapped[:2].tolist() == [18.0, 79.0]
    assert engines.test.rul_uncapped.max() == 194.0
    assert engines.test.rul.max() == 125.0


def test_the_largest_subset_fits_in_a_gigabyte(cmapss: Path) -> None:
    tracemalloc.start()
    try:
        engines = data.load(cmapss, "FD004")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(engines.train.rul) > 40_000
    assert engines.train.windows.nbytes < peak < 1e9


# The files.


def test_packed_and_plain_files_read_the_same(tmp_path: Path) -> None:
    save(fleet(), tmp_path)
    plain = data.read_fleet(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = data.read_fleet(tmp_path)
    np.testing.assert_equal(packed, plain)
    np.testing.assert_equal(packed, fleet())


def test_the_plain_file_is_preferred(tmp_path: Path) -> None:
    save(fleet(), tmp_path)
    (tmp_path / "RUL_FD001.txt.gz").write_bytes(b"not read")
    assert data.read_fleet(tmp_path).test_rul.tolist() == [112.0, 200.0, 7.0]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("  \n", "\n"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + "\n  \n",
        lambda text: "\ufeff" + text,
        lambda text: "\n" + text.rstrip(),
        lambda text: text.replace(" ", "\t"),
    ],
    ids=["no trailing spaces", "CRLF", "empty lines", "byte order mark", "no last newline", "tabs"],
)
def test_harmless_differences_are_read(tmp_path: Path, change: Callable[[str], str]) -> None:
    path = save(fleet(), tmp_path) / "train_FD001.txt"
    path.write_bytes(change(path.read_text()).encode())
    np.testing.assert_array_equal(data.read_table(path), fleet().train)


def field(line: int, column: int, value: str) -> Callable[[list[str]], list[str]]:
    """Replace one field; lines and columns count from 1."""

    def change(lines: list[str]) -> list[str]:
        fields = lines[line - 1].split()
        fields[column - 1] = value
        return [*lines[: line - 1], " ".join(fields), *lines[line:]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: [], r"line 1: the file is empty, expected 26 numbers a line"),
        (lambda _: ["", "  "], r"line 1: the file is empty"),
        (
            lambda lines: [*lines[:4], lines[4].rsplit(maxsplit=1)[0], *lines[5:]],
            r"line 5: 25 columns, expected 26 numbers a line",
        ),
        (lambda lines: [*lines[:2], lines[2] + " 1.0", *lines[3:]], r"line 3: 27 columns"),
        (lambda lines: [line.rsplit(maxsplit=2)[0] for line in lines], r"line 1: 24 columns"),
        (field(7, 9, "5x1"), r"line 7: sensor_4 is '5x1', expected a number"),
        (field(7, 9, "1_0"), r"line 7: sensor_4 is '1_0', expected a number"),
        (field(7, 3, "\xb5"), r"line 7: setting_1 is '\xb5', expected a number"),
        (field(8, 6, "nan"), r"line 8: sensor_1 is nan, expected a finite number"),
        (field(8, 26, "-inf"), r"line 8: sensor_21 is -inf, expected a finite number"),
        (field(8, 26, "1e999"), r"line 8: sensor_21 is inf, expected a finite number"),
        (field(9, 1, "1.5"), r"line 9: engine is 1.5, expected a whole number"),
        (field(9, 1, "3000000000"), r"line 9: engine is 3000000000, expected a whole number"),
        (field(9, 2, "9.5"), r"line 9: cycle is 9.5, expected a whole number"),
        (field(9, 2, "-9"), r"line 9: cycle is -9, expected a whole number"),
        (
            lambda lines: lines[:10] + lines[11:],
            r"line 11: engine 1 has cycle 12, expected cycle 11",
        ),
        (lambda lines: lines[1:], r"line 1: engine 1 has cycle 2, expected cycle 1"),
        (
            lambda lines: ["", *lines[:10], "", *lines[11:]],
            r"line 13: engine 1 has cycle 12, expected cycle 11",
        ),
        (
            lambda lines: lines[:41] + lines[42:],
            r"line 42: engine 2 has cycle 3, expected cycle 2",
        ),
        (
            lambda lines: lines[:20] + lines[40:] + lines[20:40],
            r"line 149: engine 1 comes a second time",
        ),
    ],
)
def test_a_malformed_table_is_named_by_file_and_line(
    tmp_path: Path, change: Callable[[list[str]], list[str]], message: str
) -> None:
    path = save(fleet(), tmp_path) / "train_FD001.txt"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"train_FD001\.txt, {message}"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: the file is empty, expected one number a line"),
        ("112\n200\n", r"line 3: 2 values in all, expected 3"),
        ("112\n200\n7\n8\n", r"line 4: 4 values in all, expected 3"),
        ("112\n-1\n7\n", r"line 2: RUL is -1, expected a number of cycles that is not negative"),
        ("112\nnan\n7\n", r"line 2: RUL is nan, expected a finite number"),
        ("112\nten\n7\n", r"line 2: RUL is 'ten', expected a number"),
        ("112\n200 7\n", r"line 2: 2 columns, expected one number a line"),
        ("112 200 7\n", r"line 1: 3 columns, expected one number a line"),
    ],
)
def test_a_malformed_rul_file_is_named_by_file_and_line(
    tmp_path: Path, text: str, message: str
) -> None:
    (save(fleet(), tmp_path) / "RUL_FD001.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"RUL_FD001\.txt, {message}"):
        data.load(tmp_path)


def test_a_broken_gzip_file_is_named(tmp_path: Path) -> None:
    path = save(fleet(), tmp_path) / "test_FD001.txt"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    for content in (b"not gzip", packed[:-20], packed[:40] + b"0000" + packed[44:]):
        (tmp_path / "test_FD001.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"test_FD001\.txt\.gz is no valid gzip file"):
            data.load(tmp_path)


@pytest.mark.parametrize("name", ["train_FD001.txt", "test_FD001.txt", "RUL_FD001.txt"])
def test_a_missing_file_is_named_with_what_there_is(tmp_path: Path, name: str) -> None:
    (save(fleet(), tmp_path) / name).rename(tmp_path / name.replace("1", "7"))
    kind = name.split("_")[0]
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing.*there is {kind}_FD007.txt"):
        data.load(tmp_path)


def test_a_missing_folder_or_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        data.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt is missing"):
        data.read_table(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match=r"there is none"):
        data.load(tmp_path)


def same(one: data.Fleet, other: data.Fleet) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def packed(folder: Path, inside: str = "") -> Path:
    """An archive of the text files of a folder, which go."""
    archive = folder / "CMAPSSData.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for path in sorted(folder.glob("*.txt")):
            opened.write(path, inside + path.name)
            path.unlink()
    return archive


@pytest.mark.parametrize("inside", ["", "CMAPSSData/"])
def test_a_zip_archive_is_read_or_a_folder_that_holds_it(tmp_path: Path, inside: str) -> None:
    archive = packed(save(fleet(), tmp_path), inside)
    assert same(data.read_fleet(archive), fleet())
    assert same(data.read_fleet(tmp_path), fleet())
    missing = rf"train_FD007.txt is missing.*there is .*zip/{inside}train_FD001.txt"
    with pytest.raises(FileNotFoundError, match=missing):
        data.read_fleet(archive, "FD007")


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    archive = packed(save(fleet(), tmp_path))
    whole = archive.read_bytes()
    for content in (whole[:60] + b"0000" + whole[64:], whole[:-30], b"not a zip archive"):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=r"zip.*(cannot be unpacked|no valid zip archive)"):
            data.read_fleet(tmp_path)
    with pytest.raises(ValueError, match=r"zip is a file that is neither one of the C-MAPSS"):
        data.read_fleet(archive)


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    for name, content in zip(NAMES, (" " * 2**24, "", ""), strict=True):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"zip/train_FD001.txt unpacks to more than"):
        data.read_fleet(packed(tmp_path))


def test_the_path_of_one_of_the_files_will_do(tmp_path: Path) -> None:
    save(fleet(), tmp_path)
    for name in NAMES:
        assert same(data.read_fleet(tmp_path / name), fleet())
    with pytest.raises(ValueError, match="is a file of the subset FD001, and subset=FD003: pass"):
        data.read_fleet(tmp_path / "train_FD001.txt", "FD003")
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(ValueError, match=r"readme\.txt is a file that is neither one of"):
        data.read_fleet(tmp_path / "readme.txt")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-8"])
def test_files_with_a_mark_of_their_encoding(tmp_path: Path, encoding: str) -> None:
    """As PowerShell writes them."""
    for path in save(fleet(), tmp_path).glob("*.txt"):
        path.write_bytes(("\ufeff" + path.read_text()).replace("\n", "\r\n").encode(encoding))
    assert same(data.read_fleet(tmp_path), fleet())


def test_tables_in_memory_are_checked_too() -> None:
    with_gap = np.delete(fleet().train, 4, axis=0)
    with pytest.raises(ValueError, match=r"train, row 4: engine 1 has cycle 6, expected cycle 5"):
        data.prepare(fleet(train=with_gap))
    with_nan = fleet().test
    with_nan[3, 7] = np.nan
    with pytest.raises(ValueError, match=r"test, row 3: sensor_3 is nan"):
        data.prepare(fleet(test=with_nan))
    with pytest.raises(ValueError, match=r"test_rul, row 2: 2 values in all, expected 3"):
        data.prepare(fleet(test_rul=np.array([1.0, 2.0])))
    with pytest.raises(ValueError, match=r"test_rul must be \[test engines\], got \(3, 1\)"):
        data.prepare(fleet(test_rul=np.ones((3, 1))))
    with pytest.raises(ValueError, match=r"test must be \[rows, 26\] .* got \(0, 26\)"):
        data.prepare(fleet(test=np.empty((0, 26))))
    with pytest.raises(ValueError, match=r"rows must be \[rows, 26\] .* got \(2, 25\)"):
        data.normalize(np.ones((2, 25)), data.fit_normalization(fleet().train))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, r"window=0 must be at least 1"),
        ({"stride": 0}, r"stride=0 must be at least 1"),
        ({"max_rul": 0.0}, r"max_rul=0.0 must be a positive number"),
        ({"max_rul": float("nan")}, r"max_rul=nan must be a positive number"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1.0 must be in \[0, 1\)"),
        ({"validation_fraction": -0.1}, r"validation_fraction=-0.1 must be in"),
        ({"validation_fraction": 0.95}, r"holds out 5 of 5 training engines.*pass a smaller one"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.prepare(fleet(), **arguments)  # pyright: ignore[reportArgumentType]


# Splits and statistics.


def test_validation_is_by_engine_and_seeded() -> None:
    first, again, other = (data.prepare(fleet(), seed=seed) for seed in (0, 0, 3))
    for engines in (first, other):
        held_out, kept = set(engines.validation.engine), set(engines.train.engine)
        assert len(held_out) == 1
        assert held_out | kept == {1, 2, 3, 4, 5}
        assert not held_out & kept
    assert set(first.validation.engine) != set(other.validation.engine)
    np.testing.assert_equal(first.train, again.train)


def test_no_engines_held_out_leaves_an_empty_split() -> None:
    engines = data.prepare(fleet(), validation_fraction=0.0)
    assert engines.validation.windows.shape == (0, 30, 17)
    assert len(engines.train.rul) == len(fleet().train)


def test_the_statistics_see_the_training_engines_only() -> None:
    before = data.prepare(fleet())
    train, test = fleet().train, fleet().test
    train[np.isin(train[:, 0], before.validation.engine), 5:] *= 1000.0
    test[:, 5:] += 77.0
    after = data.prepare(fleet(train=train, test=test))
    np.testing.assert_equal(after.normalization, before.normalization)
    np.testing.assert_array_equal(after.train.windows, before.train.windows)
    assert np.abs(after.validation.windows - before.validation.windows).max() > 100.0
    # And they do see every one of the training engines.
    for engine in set(before.train.engine):
        changed = fleet().train
        changed[changed[:, 0] == engine, 5:] *= 2.0
        moved = data.prepare(fleet(train=changed)).normalization
        assert (moved.sensor_mean != before.normalization.sensor_mean).all()


def test_each_condition_has_its_own_statistics() -> None:
    rows = table({1: 40, 2: 40}, altitudes=(0.0, 10.004, 9.996, 0.009))
    high = rows[:, 2] > 5.0
    rows[high, 5:] = 100.0 + 50.0 * rows[high, 5:]
    normalization = data.fit_normalization(rows)
    assert normalization.conditions[:, :, 0].tolist() == [[0.0, 0.009], [9.996, 10.004]]
    features = data.normalize(rows, normalization)
    for members in (high, ~high):
        np.testing.assert_allclose(features[members, 3:].mean(axis=0), 0.0, atol=1e-6)
        np.testing.assert_allclose(features[members, 3:].std(axis=0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(features[:, 0].std(), 1.0, rtol=1e-6)


def test_a_constant_column_becomes_zero_exactly() -> None:
    rows = table({1: 40, 2: 40, 3: 40}, altitudes=(0.0, 10.0))
    rows[:, 7] = 0.1  # its mean over 80 rows is not 0.1, and its deviation not 0
    rows[rows[:, 2] == 10.0, 8] = 1589.7
    test = table({1: 31}, altitudes=(0.0, 10.0))
    engines = data.prepare(data.Fleet(rows, test, np.array([5.0])))
    columns = dict(zip(engines.feature_names, engines.test.windows[0].T, strict=True))
    assert not columns["setting_3"].any()
    assert not columns["sensor_3"].any()
    at_sea_level = columns["setting_1"] < 0
    assert not columns["sensor_4"][~at_sea_level].any()
    assert columns["sensor_4"][at_sea_level].all()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_unseen_condition_is_named(split: str) -> None:
    train, test = table({1: 40, 2: 40, 3: 40}), table({8: 31, 9: 31})
    held_out = int(data.prepare(data.Fleet(train, test, np.ones(2))).validation.engine[0])
    rows, engine = (train, held_out) if split == "validation" else (test, 9)
    row = np.flatnonzero(rows[:, 0] == engine)[11]
    rows[row, 2:5] = (25.003, 0.6211, 60.0)
    message = (
        rf"{split} engine {engine}, cycle 12, flies in the operating condition "
        r"\(altitude 25\.0, Mach 0\.62, throttle 60\.0\), which no training engine has seen "
        r"\(they have seen \(altitude 0\.0, Mach 0\.00, throttle 100\.0\)\)"
    )
    with pytest.raises(ValueError, match=message):
        data.prepare(data.Fleet(train, test, np.ones(2)))


# Windows and targets.


@settings(max_examples=60)
@given(
    lives=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    window=st.integers(1, 12),
    stride=st.integers(1, 9),
    descending=st.booleans(),
)
def test_windows_equal_a_plain_loop(
    lives: list[int], window: int, stride: int, descending: bool
) -> None:
    numbers = range(len(lives), 0, -1) if descending else range(1, len(lives) + 1)
    rows = table(dict(zip(numbers, lives, strict=True)))
    rul = np.arange(float(len(lives))) * 60.0
    engines = data.prepare(
        data.Fleet(rows, rows, rul), window=window, stride=stride, validation_fraction=0.0
    )
    features = data.normalize(rows, engines.normalization)

    windows, left, engine_numbers, last_windows = [], [], [], []
    for engine in numbers:
        mine = features[rows[:, 0] == engine]
        padded = np.concatenate([np.repeat(mine[:1], window - 1, axis=0), mine])
        ends = sorted(range(len(mine) - 1, -1, -stride))
        windows += [padded[end : end + window] for end in ends]
        left += [len(mine) - 1 - end for end in ends]
        engine_numbers += [engine] * len(ends)
        last_windows.append(padded[-window:])
    np.testing.assert_array_equal(engines.train.windows, np.stack(windows))
    assert engines.train.rul_uncapped.tolist() == left
    assert engines.train.engine.tolist() == engine_numbers
    np.testing.assert_array_equal(engines.test.windows, np.stack(last_windows))
    assert engines.test.engine.tolist() == list(numbers)
    assert engines.test.rul_uncapped.tolist() == rul.tolist()


@settings(max_examples=30)
@given(life=st.integers(1, 300), max_rul=st.floats(1.0, 400.0), stride=st.integers(1, 40))
def test_the_capped_rul_falls_to_zero_and_the_health_follows(
    life: int, max_rul: float, stride: int
) -> None:
    tables = data.Fleet(table({1: life}), table({1: 3}), np.array([999.0]))
    engines = data.prepare(
        tables, window=2, stride=stride, max_rul=max_rul, validation_fraction=0.0
    )
    rul, uncapped, health = (
        engines.train.rul,
        engines.train.rul_uncapped,
        engines.train.health,
    )
    assert (np.diff(rul) <= 0).all()
    assert (np.diff(health) >= 0).all()
    assert (np.diff(uncapped) == -stride).all()
    assert rul[-1] == 0.0
    assert health[-1] == 2
    np.testing.assert_array_equal(rul, np.minimum(uncapped, np.float32(max_rul)))
    assert engines.test.rul[0] == np.float32(max_rul)
    assert engines.test.rul_uncapped[0] == 999.0
    assert engines.test.health[0] == data.health_from_rul(max_rul)  # the capped RUL decides


def test_health_changes_at_the_documented_cycles() -> None:
    rul = [0.0, 30.0, 30.001, 31.0, 80.0, 80.001, 81.0, 125.0]
    health = data.health_from_rul(rul)
    assert health.tolist() == [2, 2, 1, 1, 1, 0, 0, 0]
    assert health.dtype == np.int32
    with pytest.raises(ValueError, match=r"rul holds a NaN"):
        data.health_from_rul([1.0, np.nan])


def test_load_is_prepare_of_what_was_read(tmp_path: Path) -> None:
    save(fleet(), tmp_path)
    arguments = {
        "window": 8,
        "stride": 3,
        "sensors_only": True,
        "validation_fraction": 0.4,
        "seed": 5,
        "max_rul": 20.0,
    }
    loaded = data.load(tmp_path, **arguments)
    prepared = data.prepare(fleet(), **arguments)
    np.testing.assert_equal(vars(loaded), vars(prepared))
    assert loaded.train.windows.shape[1:] == (8, 14)
    assert len(set(loaded.validation.engine)) == 2
    assert loaded.train.rul.max() == 20.0
