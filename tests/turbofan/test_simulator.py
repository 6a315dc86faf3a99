"""The simulated fleet: its wear, its ranges, and its files."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from gaba_jax.turbofan import data, metrics, simulator

CONSTANT_SENSORS = (1, 5, 6, 10, 16, 18, 19)


@pytest.fixture(scope="module")
def fleet() -> data.Fleet:
    return simulator.simulate()


def lives(rows: np.ndarray) -> np.ndarray:
    return np.unique(rows[:, 0], return_counts=True)[1]


def test_the_default_fleet_has_real_looking_ranges(fleet: data.Fleet) -> None:
    assert lives(fleet.train).shape == lives(fleet.test).shape == fleet.test_rul.shape == (50,)
    assert 128 <= lives(fleet.train).min() < 160
    assert 250 < lives(fleet.train).max() <= 362
    assert 180 < np.median(lives(fleet.train)) < 220
    # Means and deviations of FD001.
    for sensor, mean, deviation in (
        (2, 642.68, 0.50),
        (3, 1590.5, 6.1),
        (4, 1408.9, 9.0),
        (7, 553.37, 0.89),
        (9, 9065.2, 22.1),
        (11, 47.54, 0.27),
        (12, 521.41, 0.74),
        (20, 38.82, 0.18),
    ):
        column = fleet.train[:, 4 + sensor]
        assert abs(column.mean() - mean) < 0.5 * deviation
        assert 0.5 * deviation < column.std() < 1.5 * deviation
    for sensor in range(1, 22):
        varies = np.ptp(fleet.train[:, 4 + sensor]) > 0
        assert varies == (sensor not in CONSTANT_SENSORS)
        assert varies == (sensor in data.INFORMATIVE_SENSORS)


def test_test_runs_stop_before_the_failure(fleet: data.Fleet) -> None:
    assert fleet.test_rul.min() >= 6
    assert fleet.test_rul.max() <= 145
    assert np.ptp(fleet.test_rul) > 100
    assert lives(fleet.test).min() >= 30
    whole = lives(fleet.test) + fleet.test_rul
    assert whole.min() >= 128
    assert whole.max() <= 362


def test_wear_moves_the_sensors_exponentially() -> None:
    rows = simulator.simulate(num_train=20, num_test=1, noise=0.0).train
    for engine in range(1, 21):
        run = rows[rows[:, 0] == engine]
        exhaust, pressure = run[:, 4 + 4], run[:, 4 + 7]
        assert (np.diff(exhaust) >= 0).all()
        assert (np.diff(pressure) <= 0).all()
        assert 20.0 < exhaust[-1] - exhaust[0] < 40.0
        # The last third of the life makes most of the change.
        assert exhaust[-1] - exhaust[-len(run) // 3] > 2 * (exhaust[len(run) // 3] - exhaust[0])


@pytest.mark.parametrize("conditions", [1, 6])
def test_the_loader_finds_the_conditions(conditions: int) -> None:
    tables = simulator.simulate(num_train=4, num_test=2, conditions=conditions)
    found = data.fit_normalization(tables.train)
    assert len(found.conditions) == conditions
    assert (found.sensor_scale > 0).all()
    assert len(data.fit_normalization(tables.test).conditions) == conditions


def test_the_second_fault_mode_raises_the_pressure_instead() -> None:
    def pressure_gains(fault_modes: int) -> np.ndarray:
        rows = simulator.simulate(num_train=30, num_test=1, fault_modes=fault_modes).train
        runs = [rows[rows[:, 0] == engine, 4 + 7] for engine in range(1, 31)]
        return np.array([run[-5:].mean() - run[:20].mean() for run in runs])

    assert (pressure_gains(1) < -1.0).all()
    both = pressure_gains(2)
    assert 5 <= (both > 5.0).sum() <= 25
    assert ((both > 5.0) | (both < -1.0)).all()


def test_noise_is_scaled() -> None:
    def roughness(noise: float) -> float:
        rows = simulator.simulate(num_train=1, num_test=1, noise=noise).train
        return float(np.diff(rows[:60, 4 + 3]).std() / np.sqrt(2))

    assert roughness(0.0) < 0.1
    assert 3.0 < roughness(1.0) < 5.0
    assert 6.0 < roughness(2.0) < 10.0


def test_engines_depend_on_seed_and_number_alone() -> None:
    small, large, other = (
        simulator.simulate(num_train=3, num_test=2, seed=7),
        simulator.simulate(num_train=5, num_test=4, seed=7),
        simulator.simulate(num_train=3, num_test=2, seed=8),
    )
    np.testing.assert_array_equal(large.train[: len(small.train)], small.train)
    np.testing.assert_array_equal(large.test[: len(small.test)], small.test)
    np.testing.assert_array_equal(large.test_rul[:2], small.test_rul)
    assert not np.array_equal(small.train[:100], other.train[:100])
    assert not np.array_equal(small.train[:20, 5:], small.test[:20, 5:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0}, r"num_train=0 and num_test=50 must be at least 1"),
        ({"num_test": 0}, r"num_train=50 and num_test=0 must be at least 1"),
        ({"conditions": 3}, r"conditions=3 must be 1 or 6"),
        ({"fault_modes": 0}, r"fault_modes=0 must be 1 or 2"),
        ({"noise": -1.0}, r"noise=-1.0 must be a finite scale"),
        ({"noise": float("inf")}, r"noise=inf must be a finite scale"),
        ({"seed": -1}, r"seed=-1 must be at least 0"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulator.simulate(**arguments)


def test_a_line_fit_learns_from_the_default_fleet(fleet: data.Fleet) -> None:
    engines = data.prepare(fleet)

    def inputs(windows: np.ndarray) -> np.ndarray:
        level, rise = windows.mean(axis=1), windows[:, 15:].mean(axis=1) - windows.mean(axis=1)
        return np.concatenate([level, rise, np.ones((len(level), 1))], axis=1)

    weights = np.linalg.lstsq(inputs(engines.train.windows), engines.train.rul)[0]
    for split in (engines.validation, engines.test):
        constant = metrics.rmse(np.full_like(split.rul, engines.train.rul.mean()), split.rul)
        fitted = metrics.rmse(inputs(split.windows) @ weights, split.rul)
        assert fitted < 0.75 * constant


# Files.


@pytest.mark.parametrize(("conditions", "fault_modes"), [(1, 1), (6, 2)])
def test_written_and_read_the_fleet_is_the_same(
    tmp_path: Path, conditions: int, fault_modes: int
) -> None:
    fleet = simulator.simulate(6, 4, conditions=conditions, fault_modes=fault_modes)
    simulator.write(fleet, tmp_path / "new" / "folder", "FD009")
    read = data.read_fleet(tmp_path / "new" / "folder", "FD009")
    np.testing.assert_equal(read, fleet)
    loaded, prepared = data.load(tmp_path / "new" / "folder", "FD009"), data.prepare(fleet)
    np.testing.assert_equal(vars(loaded), vars(prepared))


@pytest.mark.parametrize("subset", ["FD001", "FD002", "FD003", "FD004"])
def test_public_files_are_written_back_byte_for_byte(
    cmapss: Path, tmp_path: Path, subset: str
) -> None:
    simulator.write(data.read_fleet(cmapss, subset), tmp_path, subset)
    for kind in ("train", "test", "RUL"):
        original = gzip.decompress((cmapss / f"{kind}_{subset}.txt.gz").read_bytes())
        assert (tmp_path / f"{kind}_{subset}.txt").read_bytes() == original


def test_files_of_other_content_are_kept_unless_told(tmp_path: Path) -> None:
    first, second = (simulator.simulate(2, 1, seed=seed) for seed in (0, 1))
    simulator.write(first, tmp_path)
    simulator.write(first, tmp_path)  # the same content is no conflict
    (tmp_path / "train_FD001.txt").unlink()
    with pytest.raises(FileExistsError, match=r"test_FD001\.txt is there already.*overwrite=True"):
        simulator.write(second, tmp_path)
    assert not (tmp_path / "train_FD001.txt").exists()
    simulator.write(second, tmp_path, overwrite=True)
    np.testing.assert_array_equal(data.read_fleet(tmp_path).test, second.test)


def test_a_packed_file_is_not_shadowed_unless_told(tmp_path: Path) -> None:
    (tmp_path / "train_FD001.txt.gz").write_bytes(b"precious")
    fleet = simulator.simulate(2, 1)
    with pytest.raises(FileExistsError, match=r"train_FD001\.txt\.gz is there already"):
        simulator.write(fleet, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train_FD001.txt.gz"]
    simulator.write(fleet, tmp_path, overwrite=True)
    assert (tmp_path / "train_FD001.txt.gz").read_bytes() == b"precious"
    np.testing.assert_array_equal(data.read_fleet(tmp_path).train, fleet.train)


def test_malformed_tables_are_not_written(tmp_path: Path) -> None:
    fleet = simulator.simulate(2, 1)
    with pytest.raises(ValueError, match=r"test_rul, row 1: 2 values in all, expected 1"):
        simulator.write(fleet._replace(test_rul=np.ones(2)), tmp_path)
    assert not list(tmp_path.iterdir())
