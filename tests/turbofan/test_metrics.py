"""The measures against numbers computed by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from gaba_jax.turbofan import metrics

RUL_MEASURES = (metrics.rmse, metrics.nasa_score, metrics.late_prediction_rate)
HEALTH_MEASURES = (metrics.health_accuracy, metrics.macro_f1, metrics.confusion_matrix)


def test_rmse() -> None:
    assert metrics.rmse([13, 24], [10, 20]) == pytest.approx(math.sqrt((9 + 16) / 2))
    assert metrics.rmse(np.float32([1e4]), np.float32([0])) == 1e4
    assert metrics.rmse([5.0], [5.0]) == 0.0


def test_nasa_score() -> None:
    assert metrics.nasa_score([10.0], [23.0]) == pytest.approx(math.e - 1)  # 13 early
    assert metrics.nasa_score([20.0], [10.0]) == pytest.approx(math.e - 1)  # 10 late
    assert metrics.nasa_score([10.0], [10.0]) == 0.0
    # 26 early, 5 late, 0: e^2 - 1 + e^.5 - 1 = 6.3890561 + 0.6487213
    assert metrics.nasa_score([0, 15, 7], [26, 10, 7]) == pytest.approx(7.0377774)
    assert metrics.nasa_score([1e5], [0.0]) == math.inf


def test_late_prediction_rate() -> None:
    assert metrics.late_prediction_rate([11, 10, 9, 8, 30], [10, 10, 10, 10, 10]) == 0.4
    assert metrics.late_prediction_rate([1.0], [1.0]) == 0.0


@given(
    st.lists(
        st.tuples(st.floats(0, 300), st.floats(0, 300)),
        min_size=1,
        max_size=20,
    )
)
def test_late_costs_more_than_early(pairs: list[tuple[float, float]]) -> None:
    predicted, true = np.array(pairs).T
    above, below = true + abs(predicted - true), true - abs(predicted - true)
    assert metrics.nasa_score(above, true) >= metrics.nasa_score(below, true) >= 0.0
    assert metrics.rmse(above, true) == pytest.approx(metrics.rmse(below, true), abs=1e-9)


def test_health_measures() -> None:
    predicted = [0, 0, 0, 1, 1, 2, 0, 2]
    true = [0, 0, 1, 1, 2, 2, 2, 0]
    # Rows are the truth: class 0 has 2 right, one called 2; class 1 one of 2; class 2 one of 3.
    assert metrics.confusion_matrix(predicted, true).tolist() == [[2, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert metrics.health_accuracy(predicted, true) == 0.5
    # F1: 4 / (4 + 2 + 1), 2 / (2 + 1 + 1), 2 / (2 + 1 + 2)
    assert metrics.macro_f1(predicted, true) == pytest.approx((4 / 7 + 1 / 2 + 2 / 5) / 3)


def test_macro_f1_leaves_out_a_class_that_does_not_occur() -> None:
    assert metrics.macro_f1([0, 0, 2], [0, 0, 2]) == 1.0
    # Class 1 is predicted once, never true: its score is 0 and counts.
    assert metrics.macro_f1([0, 1, 2], [0, 0, 2]) == pytest.approx((2 / 3 + 0 + 1) / 3)
    # Class 1 is true once, never predicted: likewise.
    assert metrics.macro_f1([0, 0, 2], [0, 1, 2]) == pytest.approx((2 / 3 + 0 + 1) / 3)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30),
    st.permutations([0, 1, 2]),
)
def test_health_measures_do_not_depend_on_the_names_of_classes(
    pairs: list[tuple[int, int]], names: list[int]
) -> None:
    predicted, true = np.array(pairs).T
    renamed = np.array(names)[predicted], np.array(names)[true]
    assert metrics.health_accuracy(*renamed) == metrics.health_accuracy(predicted, true)
    assert metrics.macro_f1(*renamed) == pytest.approx(metrics.macro_f1(predicted, true))
    assert metrics.confusion_matrix(predicted, true).sum() == len(pairs)


def test_evaluate_collects_all_measures() -> None:
    measured = metrics.evaluate([13.0, 24.0], [10.0, 34.0], [0, 1], [0, 2])
    assert measured == {
        "rmse": pytest.approx(math.sqrt(109 / 2)),
        "nasa_score": pytest.approx(math.exp(0.3) + math.exp(10 / 13) - 2),
        "late_prediction_rate": 0.5,
        "health_accuracy": 0.5,
        "macro_f1": pytest.approx(1 / 3),
    }
    assert all(type(value) is float for value in measured.values())


@pytest.mark.parametrize("measure", RUL_MEASURES)
def test_nan_stays_nan(measure: Callable[..., float]) -> None:
    assert math.isnan(measure([1.0, np.nan], [1.0, 2.0]))


@pytest.mark.parametrize("measure", RUL_MEASURES + HEALTH_MEASURES)
@pytest.mark.parametrize(
    ("predicted", "true"),
    [([[1], [2]], [1, 2]), ([1, 2], [[1], [2]]), ([1, 2], [1]), ([], []), (1, 1)],
)
def test_shapes_that_would_broadcast_are_refused(
    measure: Callable[..., object], predicted: ArrayLike, true: ArrayLike
) -> None:
    with pytest.raises(ValueError, match=r"must both be \[N\] with N >= 1, got \("):
        measure(predicted, true)


@pytest.mark.parametrize("measure", HEALTH_MEASURES)
def test_a_value_that_is_no_class_is_named(measure: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"predicted_health holds 3, expected the classes"):
        measure([0, 3], [0, 1])
    with pytest.raises(ValueError, match=r"true_health holds -1, expected the classes"):
        measure([0, 1], [0, -1])
    with pytest.raises(ValueError, match=r"predicted_health holds 0\.5, expected the classes"):
        measure([0, 0.5], [0, 1])
