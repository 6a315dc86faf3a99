"""Pictures: what is drawn, with which labels, and nothing is cut off."""

import io

import numpy as np
import pytest

from gaba_jax import plot
from gaba_jax.turbofan import plots


def drawn(figure):
    """Renders the figure and checks that every label lies inside it."""
    figure.savefig(io.BytesIO(), format="png", dpi=100)
    canvas = figure.bbox
    for axes in figure.axes:
        for text in [axes.xaxis.label, axes.yaxis.label]:
            box = text.get_window_extent()
            assert canvas.x0 <= box.x0
            assert box.x1 <= canvas.x1
            assert canvas.y0 <= box.y0
            assert box.y1 <= canvas.y1
    return figure


def test_balance_history_draws_the_given_numbers():
    rng = np.random.default_rng(0)
    norms = rng.uniform(1, 2, (60, 2)) * [500, 1]
    weights = rng.dirichlet([1, 1], 60)
    norm_axes, ratio_axes, weight_axes = drawn(
        plot.balance_history(norms, weights, ["rul", "health"])
    ).axes
    np.testing.assert_allclose(norm_axes.lines[0].get_ydata(), norms[:, 0])
    np.testing.assert_allclose(weight_axes.lines[1].get_ydata(), weights[:, 1])
    np.testing.assert_allclose(ratio_axes.lines[0].get_ydata(), norms[:, 0] / norms[:, 1])
    assert norm_axes.get_yscale() == ratio_axes.get_yscale() == "log"
    for axes, labels in [
        (norm_axes, ["rul", "health"]),
        (ratio_axes, ["gradients", "weighted"]),
        (weight_axes, ["rul", "health"]),
    ]:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
        assert axes.get_xlabel() == "update"


def test_zero_norms_leave_gaps():
    norms = np.array([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    figure = drawn(plot.balance_history(norms, np.full((3, 2), 0.5), ["a", "b"]))
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), [np.nan, 2, np.nan])


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"K = 3 names.*\(4, 2\)"):
        plot.balance_history(np.ones((4, 2)), np.ones((4, 2)), ["a", "b", "c"])


def test_predictions():
    axes = drawn(plots.predicted_against_true([10.0, 90.0, 30.0], [20.0, 80.0, 20.0])).axes[0]
    late, early = (np.asarray(dots.get_offsets()) for dots in axes.collections)
    np.testing.assert_array_equal(late, [[80, 90], [20, 30]])
    np.testing.assert_array_equal(early, [[20, 10]])


def test_confusions():
    axes = drawn(plots.confusion_matrix([0, 1, 1, 2, 2], [0, 0, 1, 2, 2])).axes[0]
    counts = [text.get_text() for text in axes.texts]
    assert counts == ["1", "1", "0", "0", "1", "0", "0", "0", "2"]
    assert axes.get_ylabel() == "true"
