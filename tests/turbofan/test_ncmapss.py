"""Reading and windowing of N-CMAPSS files, and the memory that it takes."""

import dataclasses
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from gaba_jax.turbofan import _ncmapss_reader, data, ncmapss
from gaba_jax.turbofan.train import TrainConfig, load_data, train

COLUMNS = {
    "W": "alt Mach TRA T2",
    "X_s": "T24 T30 T48 T50 P15 P2 P21 P24 Ps30 P40 P50 Nf Nc Wf",
    "A": "unit cycle Fc hs",
}
NAMES = {kind: names.split() for kind, names in COLUMNS.items()}
INPUTS = (*NAMES["W"], *NAMES["X_s"], "cycle", "Fc")
FLIGHTS = [1, 7, 23, 40, 95]  # seconds
Arrays = dict[str, NDArray]


def layout(dev: dict[int, list[int]], test: dict[int, list[int]], seed: int = 0) -> Arrays:
    """The datasets of a file whose engines make flights of the given numbers of seconds."""
    generator = np.random.default_rng(seed)
    arrays = {f"{kind}_var": np.array(names, "S8") for kind, names in NAMES.items()}
    for part, engines in (("dev", dev), ("test", test)):
        a = [
            (unit, cycle, 1 + unit % 4, cycle < 3)
            for unit, flights in engines.items()
            for cycle, seconds in enumerate(flights, start=1)
            for _ in range(seconds)
        ]
        arrays[f"A_{part}"] = np.array(a, np.float64)
        left = [float(len(engines[int(unit)]) - cycle) for unit, cycle, _, _ in a]
        arrays[f"Y_{part}"] = np.array(left)[:, None]
        for kind in ("W", "X_s"):
            noise = generator.normal(size=(len(a), len(NAMES[kind])))
            arrays[f"{kind}_{part}"] = 1000.0 + noise * np.arange(1, len(NAMES[kind]) + 1)
        for kind in ("X_v", "T"):  # there, and never read
            arrays[f"{kind}_{part}"] = np.full((len(a), 2), np.nan)
    return arrays


def save(path: Path, arrays: Arrays, **options: object) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, **(options if values.ndim == 2 else {}))
    return path


def small() -> Arrays:
    return layout({2: FLIGHTS, 5: FLIGHTS[::-1], 16: [60, 61, 62], 20: [50]}, {11: FLIGHTS})


def plain(
    arrays: Arrays, part: str, units: set[int], window: int, stride: int, downsample: int
) -> tuple[NDArray, list[tuple[NDArray, float, int]]]:
    """The kept rows of these engines, and (window, RUL, unit), written as a person would."""
    a = arrays[f"A_{part}"]
    inputs = np.hstack([arrays[f"W_{part}"], arrays[f"X_s_{part}"], a[:, 1:3]])
    rows, found = [], []
    for unit in dict.fromkeys(a[:, 0]):
        if unit not in units:
            continue
        for cycle in dict.fromkeys(a[a[:, 0] == unit, 1]):
            of_flight = np.flatnonzero((a[:, 0] == unit) & (a[:, 1] == cycle))[::downsample]
            rows += [inputs[row] for row in of_flight]
            flight = list(of_flight)
            while len(flight) < window:
                flight.insert(0, flight[0])
            windows = []
            for end in range(len(flight), window - 1, -stride):
                members = flight[end - window : end]
                windows.append((inputs[members], arrays[f"Y_{part}"][members[-1], 0], int(unit)))
            found += windows[::-1]
    return np.array(rows), found


@pytest.mark.parametrize("chunk", [7, 2**14])
@pytest.mark.parametrize(
    ("window", "stride", "downsample"), [(1, 1, 1), (5, 3, 1), (6, 1, 4), (50, 10, 10), (4, 2, 9)]
)
def test_a_file_is_read_as_by_hand(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    window: int,
    stride: int,
    downsample: int,
) -> None:
    monkeypatch.setattr(_ncmapss_reader, "CHUNK_ROWS", chunk)
    arrays = small()
    path = save(tmp_path / "small.h5", arrays)
    found = ncmapss.load(path, window=window, stride=stride, downsample=downsample)
    assert found.feature_names == INPUTS
    cut = (window, stride, downsample)
    train_units = {int(unit) for unit in found.train.engine}
    rows, _ = plain(arrays, "dev", train_units, *cut)
    assert isinstance(found.normalization, data.Standardization)
    np.testing.assert_allclose(found.normalization.mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.normalization.scale, rows.std(axis=0), rtol=1e-12)
    mean, scale = found.normalization
    for part, split, units in (
        ("dev", found.train, train_units),
        ("dev", found.validation, {2, 5, 16, 20} - train_units),
        ("test", found.test, {11}),
    ):
        _, expected = plain(arrays, part, units, *cut)
        windows, rul, engine = zip(*expected, strict=True)
        assert split.engine.tolist() == list(engine)
        assert split.rul.tolist() == split.rul_uncapped.tolist() == list(rul)
        z = (np.array(windows) - mean) / scale
        np.testing.assert_allclose(split.windows, z, rtol=1e-6, atol=1e-6)
        assert [array.dtype.name for array in split] == [
            "float32",
            "float32",
            "int32",
            "int32",
            "float32",
        ]


def test_the_inputs_are_twenty_and_labels_are_none_of_them(tmp_path: Path) -> None:
    arrays = small()
    before = ncmapss.load(save(tmp_path / "before.h5", arrays))
    assert len(before.feature_names) == before.train.windows.shape[2] == 20
    for part in ("dev", "test"):
        arrays[f"A_{part}"][:, 3] = np.nan  # hs
    after = ncmapss.load(save(tmp_path / "after.h5", arrays))
    np.testing.assert_equal(after.train.windows, before.train.windows)
    for auxiliary in ((), ("Fc",), ("Fc", "cycle")):
        found = ncmapss.load(tmp_path / "after.h5", auxiliary=auxiliary)
        assert found.feature_names == (*INPUTS[:18], *auxiliary)
        kept = [INPUTS.index(name) for name in found.feature_names]
        np.testing.assert_equal(found.test.windows, before.test.windows[:, :, kept])


@pytest.mark.parametrize("life", [60, 90])
def test_an_engine_goes_through_all_classes(tmp_path: Path, life: int) -> None:
    path = save(tmp_path / "lives.h5", layout({1: [2] * life, 2: [2]}, {3: [2] * life}))
    health = ncmapss.load(path, window=1).test.health
    assert np.bincount(health, minlength=3).tolist() == [life - 41, 25, 16]
    assert health.tolist() == sorted(health)
    health = ncmapss.load(path, window=1, normal_above=5, critical_up_to=0).test.health
    assert np.bincount(health, minlength=3).tolist() == [life - 6, 5, 1]


@pytest.mark.parametrize(("fraction", "seed"), [(0.0, 0), (0.2, 0), (0.2, 3), (0.6, 1)])
def test_the_held_out_engines_are_those_of_prepare(
    tmp_path: Path, fraction: float, seed: int
) -> None:
    units = [2, 5, 10, 16, 18, 20]
    table = np.ones((len(units), 26))
    table[:, 0] = units
    fleet = data.Fleet(table, table, np.zeros(len(units)))
    other = data.prepare(fleet, validation_fraction=fraction, seed=seed)
    path = save(tmp_path / "units.h5", layout({unit: [3, 2] for unit in units}, {1: [1]}))
    found = ncmapss.load(path, validation_fraction=fraction, seed=seed)
    assert set(found.validation.engine) == set(other.validation.engine)
    assert set(found.train.engine) == set(other.train.engine)
    assert len(set(found.validation.engine)) == round(fraction * len(units))
    assert found.validation.windows.shape[1:] == (50, 20)


def test_only_training_engines_are_in_the_statistics(tmp_path: Path) -> None:
    arrays = small()
    arrays["X_s_dev"][:, 3] = arrays["X_s_test"][:, 3] = 0.1  # whose mean over the rows rounds
    before = ncmapss.load(save(tmp_path / "before.h5", arrays))
    for part in ("dev", "test"):
        others = ~np.isin(arrays[f"A_{part}"][:, 0], before.train.engine)
        assert others.any()
        arrays[f"X_s_{part}"][others] += 7.0
    after = ncmapss.load(save(tmp_path / "after.h5", arrays))
    np.testing.assert_equal(after.normalization, before.normalization)
    np.testing.assert_equal(after.train, before.train)
    constant = INPUTS.index(NAMES["X_s"][3])
    assert before.normalization.scale[constant] == 0
    assert (after.test.windows[:, :, constant] == 0).all()
    assert (after.test.windows[:, :, 4] > before.test.windows[:, :, 4]).all()


# Memory.

SECONDS = 160_000  # of the longer flight, near ten chunks
LOADS = """
import resource, sys
from gaba_jax.turbofan import ncmapss
for path, downsample in ((sys.argv[1], 2), (sys.argv[2], 8)):
    ncmapss.load(path, downsample=int(downsample), validation_fraction=0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files with one long flight; the second has four times the rows of the first."""
    folder = tmp_path_factory.mktemp("flights")
    paths = []
    for seconds in (SECONDS // 4, SECONDS):
        arrays = layout({2: [1]}, {11: [1]})
        for kind in ("W", "X_s", "A", "Y"):
            arrays[f"{kind}_dev"] = np.repeat(arrays[f"{kind}_dev"], seconds, axis=0)
        arrays["W_dev"][:, 0] = np.arange(seconds)
        paths.append(save(folder / f"{seconds}.h5", arrays))
    return paths[0], paths[1]


def test_memory_does_not_grow_with_the_rows_that_are_read(flights: tuple[Path, Path]) -> None:
    peaks = []
    for path, downsample in zip(flights, (2, 8), strict=True):
        tracemalloc.start()
        try:
            found = ncmapss.load(path, downsample=downsample, validation_fraction=0)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert len(found.train.rul) == (SECONDS // 8 - 50) // 10 + 1  # both keep as many rows
    assert found.train.windows.nbytes < peaks[1]
    assert abs(peaks[1] - peaks[0]) < 2e6 < flights[1].stat().st_size / 12


@pytest.mark.slow
def test_the_process_does_not_grow_with_the_rows_that_are_read(flights: tuple[Path, Path]) -> None:
    command = [sys.executable, "-c", LOADS, *map(str, flights)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    first, second = (int(line) * unit for line in done.stdout.split())
    assert first > 5e7  # the interpreter and the libraries, so these are bytes
    assert second - first < 4e6 < flights[1].stat().st_size / 6


def test_too_much_memory_is_refused_before_it_is_taken(flights: tuple[Path, Path]) -> None:
    # 160,000 rows and a window that begins at each: 0.64 GB, and the limit is 0.5 GB.
    options = {"stride": 1, "downsample": 1, "validation_fraction": 0.0, "memory_limit": 5e8}
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"159952 windows of 20 .* 0\.691 GB, .*=0\.5 GB"):
            ncmapss.load(flights[1], **options)
        assert tracemalloc.get_traced_memory()[1] < 1e7
    finally:
        tracemalloc.stop()
    assert len(ncmapss.load(flights[1], **options | {"stride": 100}).train.rul) == 1600


# What is refused.


def without(name: str) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.pop(name)


def value(name: str, at: object, to: float) -> Callable[[Arrays], object]:
    return lambda arrays: arrays[name].__setitem__(at, to)


def replaced(name: str, change: Callable[[NDArray], NDArray]) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({name: change(arrays[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("X_s_dev"), r"X_s_dev: there is no such dataset, only A_dev, .*DS02"),
        (without("Y_test"), r"Y_test: there is no such dataset, .* of numbers; take"),
        (without("W_var"), r"W_var: there is no such dataset, .*1-dimensional dataset of names"),
        (replaced("W_dev", lambda a: a[:, :3]), r"W_dev: 3 columns, expected the 4 that W_var"),
        (replaced("A_test", lambda a: a[:, :3]), r"A_test: 3 columns, expected the 4 that A_var"),
        (replaced("X_s_var", lambda a: a[:13]), r"X_s_dev: 14 columns, expected the 13 that X_s_v"),
        (replaced("Y_dev", lambda a: np.hstack([a, a])), r"Y_dev: 2 columns, expected one column"),
        (replaced("Y_dev", lambda a: a[:, 0]), r"Y_dev: shape \(565,\) of float64, .*2-dimens"),
        (replaced("W_test", lambda a: a.astype("S")), r"W_test: shape \(166, 4\) of .S\d+, expec"),
        (replaced("X_s_dev", lambda a: a[:-4]), r"W_dev 565, X_s_dev 561, A_dev 565, Y_dev 565"),
        (replaced("Y_test", lambda a: a[:100]), r"rows are .* Y_test 100, expected the same"),
        (replaced("A_var", lambda a: a[[3, 1, 2, 3]]), r"A_var: names hs, cycle.*expected unit t"),
        (replaced("A_var", lambda a: a[[0, 3, 2, 3]]), r"A_var: names .* expected cycle too"),
        (replaced("A_var", lambda a: a[[0, 1, 3, 3]]), r"A_var: names .* expected Fc too; name"),
        (value("W_dev", (17, 2), np.nan), r"W_dev, row 17: TRA is nan, expected a finite number"),
        (value("X_s_test", (165, 13), -np.inf), r"X_s_test, row 165: Wf is -inf, .*remove the eng"),
        (value("X_s_dev", (0, 0), 1e39), r"X_s_dev, row 0: T24 is 1e\+39, expected a finite"),
        (value("Y_dev", (3, 0), np.nan), r"Y_dev, row 3: RUL is nan, expected a finite"),
        (value("Y_test", (9, 0), -1.0), r"Y_test, row 9: RUL is -1, expected .* not negative"),
        (value("A_dev", (30, 2), np.inf), r"A_dev, row 30: Fc is inf, expected a finite"),
        (value("A_dev", (30, 0), np.nan), r"A_dev, row 30: unit is nan, expected a finite"),
        (value("A_dev", (30, 1), 2.5), r"A_dev, row 30: cycle is 2\.5, expected a whole number"),
        (value("A_test", (1, 0), -3.0), r"A_test, row 1: unit is -3, expected a whole number"),
        (value("A_dev", (300, 0), 2.0), r"A_dev, row 300: unit 2 comes a second time, .*sort"),
        (value("A_dev", (300, 1), 1.0), r"A_dev, row 300: unit 5 goes from cycle 2 back to 1, ex"),
    ],
)
@pytest.mark.parametrize("chunk", [7, 2**14])
def test_a_bad_layout_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    change: Callable[[Arrays], object],
    message: str,
) -> None:
    monkeypatch.setattr(_ncmapss_reader, "CHUNK_ROWS", chunk)
    arrays = small()
    change(arrays)
    path = save(tmp_path / "bad.h5", arrays)
    with pytest.raises(ValueError, match=message) as error:
        ncmapss.load(path)
    assert str(error.value).startswith(str(path))


def test_a_value_that_standardised_is_no_float32_is_named(tmp_path: Path) -> None:
    arrays = small()
    arrays["X_s_dev"][:, 0] *= 1e-3
    arrays["X_s_test"][51, 0] = 3e38
    path = save(tmp_path / "far.h5", arrays)
    with pytest.raises(ValueError, match="X_s_test: unit 11 has a T24 that standardised is no fi"):
        ncmapss.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0 must be a whole number of at least 1"),
        ({"stride": 2.5}, "stride=2.5 must be a whole number"),
        ({"downsample": -1}, "downsample=-1 must be"),
        ({"downsample": float("nan")}, "downsample=nan must be"),
        ({"auxiliary": ("hs",)}, r"auxiliary=\('hs',\) must hold some of \('cycle', 'Fc'\)"),
        ({"auxiliary": ("Fc", "Fc")}, "each once"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1.0 must be in \[0, 1\)"),
        (
            {"validation_fraction": 0.9},
            "A_dev: validation_fraction=0.9 holds out 4 of 4",
        ),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"critical_up_to": 40.0}, "critical_up_to=40.0 and normal_above=40.0 must be finite"),
        ({"critical_up_to": -1.0}, "critical_up_to=-1.0 and"),
        ({"normal_above": float("inf")}, "normal_above=inf must be finite"),
        ({"memory_limit": 1e4}, "memory_limit=1e-05 GB; pass a bigger stride or downsample"),
    ],
)
def test_an_option_out_of_range_is_named(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    path = save(tmp_path / "small.h5", small())
    with pytest.raises(ValueError, match=message):
        ncmapss.load(path, **options)


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "cut.h5", small())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut.h5 is cut short or damaged \(.*truncated"):
        ncmapss.load(path)


@pytest.mark.parametrize("name", ["W_dev", "A_test"])
def test_a_dataset_that_is_damaged_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "damaged.h5", small(), chunks=(40, 1), compression="gzip")
    ncmapss.load(path)
    with h5py.File(path) as file:
        chunk = file[name].id.get_chunk_info_by_coord((80, 1))
    with path.open("r+b") as content:
        content.seek(chunk.byte_offset)
        content.write(bytes(chunk.size))
    with pytest.raises(ValueError, match=rf"damaged.h5, {name}, rows \d+ to \d+: cannot be read"):
        ncmapss.load(path)


def test_another_file_or_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.h5 is missing; check the folder"):
        ncmapss.load(tmp_path / "none.h5")
    path = tmp_path / "train_FD001.txt"
    path.write_text("1 1 0 0 100\n")
    with pytest.raises(ValueError, match=r"train_FD001.txt is not HDF5 \(.*get it anew"):
        ncmapss.load(path)
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("W_dev")
    with pytest.raises(ValueError, match="W_dev: there is no such dataset, only W_dev"):
        ncmapss.load(tmp_path / "group.h5")


def test_without_h5py_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[turbofan\]"'):
        ncmapss.load("any.h5")


@pytest.mark.slow
def test_the_compact_model_trains_on_it(tmp_path: Path) -> None:
    flights = [20] * 60
    path = save(tmp_path / "fleet.h5", layout({2: flights, 5: flights}, {11: flights}))
    loaded = ncmapss.load(path, window=10, stride=5, downsample=1)
    run = train(loaded, TrainConfig(epochs=1, batch_size=32))
    assert run.summary["features"] == list(INPUTS)
    assert run.summary["windows"] == {"train": 180, "validation": 180, "test": 180}
    assert run.predicted_rul.shape == (180,)
    assert run.summary["test"]["rmse"] > 0


def test_the_command_reads_it_by_its_suffix(tmp_path: Path) -> None:
    path = save(tmp_path / "fleet.h5", layout({2: [600] * 3, 5: [600] * 3}, {11: [600]}))
    config = TrainConfig(data=path, stride=5, seed=1)
    expected = ncmapss.load(path, stride=5, seed=1)
    np.testing.assert_array_equal(load_data(config).train.windows, expected.train.windows)
    with pytest.raises(ValueError, match=r"sensors_only: .* is an N-CMAPSS file"):
        load_data(dataclasses.replace(config, sensors_only=True))
