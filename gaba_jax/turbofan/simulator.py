r"""A fleet of simulated turbofan engines that run to failure, in the format of C-MAPSS.

The wear follows Saxena et al.; the thermodynamic model behind their sensors is replaced by a
linear one, with baselines, drifts and noise of the size that the public data shows. Use it to try
things without a download, not to publish numbers.

Each engine starts with some wear :math:`d` and develops one fault, in which an efficiency and a
flow capacity wear exponentially. The margins that hold the engine in operation shrink with both,
and it fails when the smallest one, its health, is used up:

.. math::
    w_k(t) = d + s \left(e^{(t / \theta_k)^b} - 1\right), \qquad
    H(t) = \min_m \Bigl(1 - \sum_k A_{mk} w_k(t)\Bigr), \qquad T = \min \{t : H(t) \le 0\}

References:
    Saxena, Goebel, Simon, Eklund, "Damage Propagation Modeling for Aircraft Engine
    Run-to-Failure Simulation", PHM 2008.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gaba_jax.turbofan.data import Fleet, check_fleet

# Altitude (1000 ft), Mach number and throttle of the six conditions, how far above them a flight
# may be, and how often an engine flies there. A fleet with one condition stays at sea level.
_SETTINGS = np.array(
    [[0, 0, 100], [10, 0.25, 100], [20, 0.7, 100], [25, 0.62, 60], [35, 0.84, 100], [42, 0.84, 100]]
)
_SETTING_SPREAD = np.array([0.008, 0.002, 0.0])
_CONDITION_SHARES = np.array([0.15, 0.15, 0.15, 0.15, 0.15, 0.25])

# One row a sensor: a young engine's value in each condition.
_BASELINES = np.array(
    [
        [518.67, 489.05, 491.19, 462.54, 449.44, 445.00],
        [642.35, 604.61, 607.30, 536.69, 555.53, 549.45],
        [1586.7, 1498.5, 1482.3, 1259.9, 1363.7, 1351.2],
        [1402.3, 1305.5, 1248.0, 1045.9, 1126.5, 1122.7],
        [14.62, 10.52, 9.35, 7.05, 5.48, 3.91],
        [21.61, 15.49, 13.65, 9.03, 8.00, 5.71],
        [553.98, 394.72, 334.84, 175.57, 194.62, 138.76],
        [2388.06, 2318.89, 2323.94, 1915.33, 2222.94, 2211.90],
        [9055.0, 8777.8, 8722.4, 8009.4, 8349.2, 8320.3],
        [1.30, 1.26, 1.08, 0.94, 1.02, 1.02],
        [47.35, 45.31, 44.28, 36.65, 41.83, 41.99],
        [521.93, 371.79, 315.18, 164.71, 183.18, 130.65],
        [2388.06, 2388.09, 2388.07, 2028.23, 2388.03, 2387.97],
        [8136.4, 8130.3, 8060.8, 7873.7, 8067.1, 8084.0],
        [8.4171, 8.6387, 9.2065, 10.8825, 9.3068, 9.3531],
        [0.03, 0.03, 0.02, 0.02, 0.02, 0.02],
        [392.27, 368.78, 364.47, 306.64, 333.41, 330.20],
        [2388, 2319, 2324, 1915, 2223, 2212],
        [100.0, 100.0, 100.0, 84.93, 100.0, 100.0],
        [38.94, 28.61, 24.53, 14.30, 14.87, 10.62],
        [23.3585, 17.1636, 14.7117, 8.5809, 8.9244, 6.3690],
    ]
)

# One row a sensor that moves: its number; its noise; what it gains at sea level from new to failed
# in the two fault modes (high-pressure compressor, fan); the part of it due to the efficiency.
_MOVING = np.array(
    [
        [2, 0.30, 1.6, 1.5, 0.7],
        [3, 4.0, 19.0, 25.0, 0.7],
        [4, 4.0, 32.0, 36.0, 0.7],
        [7, 0.41, -3.0, 17.5, 0.3],
        [8, 0.030, 0.22, 0.72, 0.5],
        [9, 4.2, 45.0, 88.0, 0.6],
        [11, 0.10, 0.98, 1.2, 0.7],
        [12, 0.30, -2.6, 17.0, 0.3],
        [13, 0.030, 0.22, 0.72, 0.5],
        [14, 3.1, 30.0, 70.0, 0.6],
        [15, 0.020, 0.127, -0.19, 0.3],
        [17, 0.90, 4.9, 6.6, 0.7],
        [20, 0.10, -0.60, 0.71, 0.3],
        [21, 0.060, -0.355, 0.43, 0.3],
    ]
)
_MOVING_SENSORS = _MOVING[:, 0].astype(np.intp) - 1
_CORE_SPEEDS = np.isin(_MOVING[:, 0], (9, 14))

# How much of each margin, stall and exhaust gas temperature, a full wear of efficiency and flow
# capacity uses up.
_MARGINS = np.array([[0.35, 0.65], [0.75, 0.25]])
_WEAR_SCALE = 0.02
_LARGEST_INITIAL_WEAR = 0.2
_LIVES = (128, 362)
_SHORTEST_TEST_RUN = 30
_TEST_RULS = (6, 145)

_DECIMALS = (0, 0, 4, 4, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4, 2, 0, 0, 2, 2, 4)
_LINE = " ".join(f"%.{decimals}f" for decimals in _DECIMALS) + "  \n"


def simulate(
    num_train: int = 50,
    num_test: int = 50,
    *,
    conditions: int = 1,
    fault_modes: int = 1,
    noise: float = 1.0,
    seed: int = 0,
) -> Fleet:
    """Simulate engines that run to failure, and engines whose records stop before it.

    Engines live 128 to 362 cycles, most of them about 200. A test run stops at a random cycle, 6
    to 145 cycles before the failure and after 30 or more. An engine depends on its number and the
    seed alone: a larger fleet begins with the same engines.

    Args:
        num_train: Engines in the training table, at least 1. Defaults to 50.
        num_test: Engines in the test table, at least 1. Defaults to 50.
        conditions: Operating conditions, 1 (sea level, as in FD001 and FD003) or 6 (another one
            each cycle, as in FD002 and FD004). Defaults to 1.
        fault_modes: 1 (the high-pressure compressor wears, as in FD001 and FD002) or 2 (in half of
            the engines the fan does, as in FD003 and FD004). Defaults to 1.
        noise: Scale of the sensor noise, at least 0, where 1 is that of the public data. Defaults
            to 1.
        seed: Seed of the generator, at least 0. Defaults to 0.

    Returns:
        The tables, in the precision of the file format.

    Raises:
        ValueError: An argument breaks its rule.

    Examples:
        >>> fleet = simulate(num_train=3, num_test=2)
        >>> fleet.train.shape[1], sorted(set(fleet.train[:, 0].tolist())), fleet.test_rul.shape
        (26, [1.0, 2.0, 3.0], (2,))
    """
    if num_train < 1 or num_test < 1:
        raise ValueError(f"{num_train=} and {num_test=} must be at least 1 engine each.")
    if conditions not in (1, len(_SETTINGS)):
        raise ValueError(f"{conditions=} must be 1 or 6 operating conditions.")
    if fault_modes not in (1, 2):
        raise ValueError(f"{fault_modes=} must be 1 or 2 fault modes.")
    if not 0.0 <= noise < np.inf:
        raise ValueError(f"{noise=} must be a finite scale of at least 0.")
    if seed < 0:
        raise ValueError(f"{seed=} must be at least 0.")
    train_generator, test_generator = np.random.default_rng(seed).spawn(2)
    train = [
        _run_to_failure(engine, conditions, fault_modes, noise, generator)
        for engine, generator in enumerate(train_generator.spawn(num_train), start=1)
    ]
    test: list[NDArray[np.float64]] = []
    rul: list[int] = []
    for engine, generator in enumerate(test_generator.spawn(num_test), start=1):
        run = _run_to_failure(engine, conditions, fault_modes, noise, generator)
        fewest, most = _TEST_RULS
        left = int(generator.integers(fewest, min(most, len(run) - _SHORTEST_TEST_RUN) + 1))
        test.append(run[: len(run) - left])
        rul.append(left)
    return Fleet(np.concatenate(train), np.concatenate(test), np.array(rul, np.float64))


def write(
    fleet: Fleet, folder: str | Path, subset: str = "FD001", *, overwrite: bool = False
) -> None:
    """Write a fleet as the three text files of a subset.

    Values are rounded to the digits of the public files; those of :func:`simulate` have no more.
    The folder is made if need be.

    Args:
        fleet: The tables.
        folder: Where ``train_<subset>.txt``, ``test_<subset>.txt`` and ``RUL_<subset>.txt`` go.
        subset: The files' common name. Defaults to ``"FD001"``.
        overwrite: Replace files of other content. Defaults to False. A ``.gz`` file of that name
            is left as it is; the reader then takes the new, plain one.

    Raises:
        FileExistsError: One of the files is there, plain with other content or as ``.gz``; none
            is written then.
        ValueError: The tables are malformed.

    Examples:
        >>> import tempfile
        >>> from gaba_jax.turbofan.data import read_fleet
        >>> fleet = simulate(num_train=2, num_test=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(fleet, folder)
        ...     bool((read_fleet(folder).train == fleet.train).all())
        True
    """
    check_fleet(fleet)
    folder = Path(folder)
    texts = {
        folder / f"train_{subset}.txt": _text(fleet.train),
        folder / f"test_{subset}.txt": _text(fleet.test),
        folder / f"RUL_{subset}.txt": "".join(f"{rul:.10g} \n" for rul in fleet.test_rul),
    }
    if not overwrite:
        for path, text in texts.items():
            packed = path.with_name(f"{path.name}.gz")
            differs = path.exists() and path.read_bytes() != text.encode()
            if differs or packed.exists():
                raise FileExistsError(
                    f"{path if differs else packed} is there already; choose another folder or "
                    "subset, or pass overwrite=True."
                )
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_bytes(text.encode())


def _text(rows: NDArray[np.float64]) -> str:
    return "".join(_LINE % tuple(row) for row in rows.tolist())


def _run_to_failure(
    engine: int,
    conditions: int,
    fault_modes: int,
    noise: float,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """One engine's whole life, [life, 26]."""
    wear = _wear(generator)
    life = len(wear)
    fan = fault_modes == 2 and generator.random() < 0.5
    if conditions == 1:
        condition = np.zeros(life, np.intp)
        settings = _SETTINGS[0] + _SETTING_SPREAD * generator.uniform(-1.0, 1.0, (life, 3))
    else:
        condition = generator.choice(conditions, size=life, p=_CONDITION_SHARES)
        settings = _SETTINGS[condition] + _SETTING_SPREAD * generator.random((life, 3))

    _, sensor_noise, gain_compressor, gain_fan, efficiency_part = _MOVING.T
    gain = gain_fan if fan else gain_compressor
    # Engines of the same make differ, in their core speeds so much that the sign is uncertain.
    gain = gain * np.where(_CORE_SPEEDS, generator.normal(1.0, 0.0 if fan else 1.0), 1.0)
    offset = 0.3 * sensor_noise * generator.normal(size=len(_MOVING))
    parts = np.stack([efficiency_part, 1.0 - efficiency_part])
    drift = gain * ((wear - _LARGEST_INITIAL_WEAR / 2) @ parts)
    baselines = _BASELINES.T[condition]
    sensors = baselines.copy()
    relative = baselines / _BASELINES[:, 0]
    sensors[:, _MOVING_SENSORS] += relative[:, _MOVING_SENSORS] * drift + offset
    sensors[:, _MOVING_SENSORS] += noise * sensor_noise * generator.normal(size=drift.shape)

    cycles = np.arange(1.0, life + 1)
    rows = np.column_stack([np.full(life, float(engine)), cycles, settings, sensors])
    # Dividing a whole number by a power of ten is what reading the printed number gives.
    powers = 10.0 ** np.array(_DECIMALS)
    return np.rint(rows * powers) / powers


def _wear(generator: np.random.Generator) -> NDArray[np.float64]:
    """Wear of efficiency and flow capacity up to the failure, [life, 2]."""
    shortest, longest = _LIVES
    cycles = np.arange(1.0, longest + 1)[:, None]
    while True:
        initial = generator.uniform(0.0, _LARGEST_INITIAL_WEAR)
        pace = 60.0 * generator.lognormal(0.0, 0.25) * generator.lognormal(0.0, 0.05, 2)
        exponent = np.minimum((cycles / pace) ** generator.uniform(1.0, 1.2), 50.0)
        wear = initial + _WEAR_SCALE * np.expm1(exponent)
        failed = np.flatnonzero((1.0 - wear @ _MARGINS.T).min(axis=1) <= 0.0)
        if len(failed) and failed[0] + 1 >= shortest:
            return wear[: failed[0] + 1]
