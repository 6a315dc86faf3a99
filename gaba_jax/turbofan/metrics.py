"""The measures that prognostics papers report, in numpy on the host.

With d the predicted minus the true RUL, in cycles, d > 0 is a late prediction: the engine fails
before the predicted time. Where an RUL is NaN, as after a training run that diverged, so are the
measures of the RUL.

References:
    Saxena, Goebel, Simon, Eklund, "Damage Propagation Modeling for Aircraft Engine
    Run-to-Failure Simulation", PHM 2008 (the score).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gaba_jax.turbofan.data import HEALTH_NAMES

_NUM_CLASSES = len(HEALTH_NAMES)


def rmse(predicted_rul: ArrayLike, true_rul: ArrayLike) -> float:
    r"""Root mean squared error.

    .. math::
        \sqrt{\frac{1}{N} \sum_n d_n^2}

    Args:
        predicted_rul: Predicted RUL, in cycles, [N].
        true_rul: True RUL, in cycles, [N].

    Returns:
        The error, in cycles.

    Raises:
        ValueError: The shapes are not the same [N] with N >= 1.

    Examples:
        >>> rmse([13.0, 24.0], [10.0, 20.0]).__round__(4)
        3.5355
    """
    return float(np.sqrt(np.mean(_difference(predicted_rul, true_rul) ** 2)))


def nasa_score(predicted_rul: ArrayLike, true_rul: ArrayLike) -> float:
    r"""The score of the PHM 2008 challenge: lower is better, late costs more than early.

    .. math::
        \sum_n \begin{cases} e^{-d_n / 13} - 1 & d_n < 0 \\ e^{d_n / 10} - 1 & d_n \ge 0
        \end{cases}

    A sum, not a mean: only scores of the same number of engines compare. One engine that is off by
    far decides it, and beyond 7000 cycles it is infinite.

    Args:
        predicted_rul: Predicted RUL, in cycles, [N].
        true_rul: True RUL, in cycles, [N].

    Returns:
        The score, at least 0.

    Raises:
        ValueError: The shapes are not the same [N] with N >= 1.

    Examples:
        >>> nasa_score([0.0, 20.0], [13.0, 10.0]).__round__(4)
        3.4366
    """
    difference = _difference(predicted_rul, true_rul)
    with np.errstate(over="ignore"):
        costs = np.expm1(np.where(difference < 0, -difference / 13.0, difference / 10.0))
    return float(np.sum(costs))


def late_prediction_rate(predicted_rul: ArrayLike, true_rul: ArrayLike) -> float:
    """Share of the engines whose failure is predicted too late.

    Args:
        predicted_rul: Predicted RUL, in cycles, [N].
        true_rul: True RUL, in cycles, [N].

    Returns:
        The share with a predicted RUL above the true one, in [0, 1].

    Raises:
        ValueError: The shapes are not the same [N] with N >= 1.

    Examples:
        >>> late_prediction_rate([11.0, 10.0, 9.0, 8.0], [10.0, 10.0, 10.0, 10.0])
        0.25
    """
    difference = _difference(predicted_rul, true_rul)
    return float(np.mean(np.where(np.isnan(difference), np.nan, difference > 0)))


def health_accuracy(predicted_health: ArrayLike, true_health: ArrayLike) -> float:
    """Share of the engines whose health is classified right.

    Args:
        predicted_health: Predicted classes, integers from 0 to 2, [N].
        true_health: True classes, integers from 0 to 2, [N].

    Returns:
        The share, in [0, 1].

    Raises:
        ValueError: The shapes are not the same [N] with N >= 1, or a value is no class.

    Examples:
        >>> health_accuracy([0, 1, 2, 2], [0, 1, 2, 1])
        0.75
    """
    predicted, true = _classes(predicted_health, true_health)
    return float(np.mean(predicted == true))


def macro_f1(predicted_health: ArrayLike, true_health: ArrayLike) -> float:
    r"""Mean of the classes' F1 scores, which counts a rare class as much as a common one.

    .. math::
        F_c = \frac{2 \, \mathrm{TP}_c}{2 \, \mathrm{TP}_c + \mathrm{FP}_c + \mathrm{FN}_c}

    A class that neither the truth nor the prediction holds has no score and is left out of the
    mean.

    Args:
        predicted_health: Predicted classes, integers from 0 to 2, [N].
        true_health: True classes, integers from 0 to 2, [N].

    Returns:
        The mean, in [0, 1].

    Raises:
        ValueError: The shapes are not the same [N] with N >= 1, or a value is no class.

    Examples:
        >>> macro_f1([0, 0, 2, 2], [0, 1, 2, 2]).__round__(4)
        0.5556
    """
    counts = confusion_matrix(predicted_health, true_health)
    occurrences = counts.sum(axis=0) + counts.sum(axis=1)
    occurs = occurrences > 0
    return float(np.mean(2 * np.diag(counts)[occurs] / occurrences[occurs]))


def confusion_matrix(predicted_health: ArrayLike, true_health: ArrayLike) -> NDArray[np.int64]:
    """Count the engines of each true class by predicted class.

    Args:
        predicted_health: Predicted classes, integers from 0 to 2, [N].
        true_health: True classes, integers from 0 to 2, [N].

    Returns:
        The counts, one row for each true class, [3, 3].

    Raises:
        ValueError: The shapes are not the same [N] with N >= 1, or a value is no class.

    Examples:
        >>> confusion_matrix([0, 0, 2, 2], [0, 1, 2, 2]).tolist()
        [[1, 0, 0], [1, 0, 0], [0, 0, 2]]
    """
    predicted, true = _classes(predicted_health, true_health)
    counts = np.bincount(true * _NUM_CLASSES + predicted, minlength=_NUM_CLASSES**2)
    return counts.reshape(_NUM_CLASSES, _NUM_CLASSES).astype(np.int64)


def evaluate(
    predicted_rul: ArrayLike,
    true_rul: ArrayLike,
    predicted_health: ArrayLike,
    true_health: ArrayLike,
) -> dict[str, float]:
    """All measures at once.

    Args:
        predicted_rul: Predicted RUL, in cycles, [N].
        true_rul: True RUL, in cycles, [N].
        predicted_health: Predicted classes, integers from 0 to 2, [N].
        true_health: True classes, integers from 0 to 2, [N].

    Returns:
        ``rmse``, ``nasa_score``, ``late_prediction_rate``, ``health_accuracy`` and ``macro_f1``.

    Raises:
        ValueError: The shapes are not the same [N] with N >= 1, or a value is no class.

    Examples:
        >>> evaluate([10.0, 99.0], [10.0, 99.0], [2, 0], [2, 1])
        {'rmse': 0.0, 'nasa_score': 0.0, 'late_prediction_rate': 0.0, 'health_accuracy': 0.5,
         'macro_f1': 0.3333333333333333}
    """
    return {
        "rmse": rmse(predicted_rul, true_rul),
        "nasa_score": nasa_score(predicted_rul, true_rul),
        "late_prediction_rate": late_prediction_rate(predicted_rul, true_rul),
        "health_accuracy": health_accuracy(predicted_health, true_health),
        "macro_f1": macro_f1(predicted_health, true_health),
    }


def _difference(predicted_rul: ArrayLike, true_rul: ArrayLike) -> NDArray[np.float64]:
    predicted, true = np.asarray(predicted_rul, np.float64), np.asarray(true_rul, np.float64)
    _check_shapes("rul", predicted.shape, true.shape)
    return predicted - true


def _classes(
    predicted_health: ArrayLike, true_health: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    predicted, true = np.asarray(predicted_health), np.asarray(true_health)
    _check_shapes("health", predicted.shape, true.shape)
    for name, classes in (("predicted_health", predicted), ("true_health", true)):
        known = np.isin(classes, range(_NUM_CLASSES))
        if not known.all():
            raise ValueError(
                f"{name} holds {classes[~known][0]}, expected the classes 0, 1 and 2; "
                "take the argmax of logits over their last axis."
            )
    return predicted.astype(np.int64), true.astype(np.int64)


def _check_shapes(what: str, predicted: tuple[int, ...], true: tuple[int, ...]) -> None:
    if len(predicted) != 1 or predicted != true or not predicted[0]:
        raise ValueError(
            f"predicted_{what} and true_{what} must both be [N] with N >= 1, "
            f"got {predicted} and {true}."
        )
