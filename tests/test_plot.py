"""Pictures: what is drawn, with which labels, and nothing is cut off."""

import itertools
import subprocess
import sys

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from gaba_jax import _drawing, monitor, plot
from gaba_jax.turbofan import plots
from tests.slow import rest_slow


def drawn(figure):
    """Renders at 400 pixels and at 200 dpi, and checks that all text is read: inside the picture,
    nothing on top of other text, and no letters smaller than screens show.
    """
    for dpi in (400 / figure.get_size_inches()[0], 200):
        figure.set_dpi(dpi)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = text_boxes(figure, canvas.get_renderer())
        for name, box, pixels in boxes:
            assert figure.bbox.x0 - 1 <= box.x0, name
            assert box.x1 <= figure.bbox.x1 + 1, name
            assert figure.bbox.y0 - 1 <= box.y0, name
            assert box.y1 <= figure.bbox.y1 + 1, name
            assert pixels >= 9 or figure.get_size_inches()[0] > 4.5, name
        for (one, box, _), (other, second, _) in itertools.combinations(boxes, 2):
            apart = (
                box.x1 <= second.x0 + 1
                or second.x1 <= box.x0 + 1
                or box.y1 <= second.y0 + 1
                or second.y1 <= box.y0 + 1
            )
            assert apart, f"{one!r} lies on {other!r}"
    return figure


def text_boxes(figure, renderer):
    """(text, extent, size in pixels) of everything written in the picture."""
    texts = [figure._supylabel] if figure._supylabel is not None else []
    legends = list(figure.legends)
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if low <= tick.get_loc() <= high:
                    texts += [tick.label1, tick.label2]
        legends += [axes.get_legend()] if axes.get_legend() else []
    texts += [text for legend in legends for text in legend.get_texts()]
    return [
        (text.get_text(), text.get_window_extent(renderer), text.get_fontsize() * figure.dpi / 72)
        for text in texts
        if text.get_visible() and text.get_text()
    ]


def labels(legend):
    return [text.get_text() for text in legend.get_texts()]


def explains(legend, lines):
    """Whether the legend shows, in this order, the colours and dashes of the lines."""
    looks = [
        [(line.get_color(), line.get_linestyle()) for line in each]
        for each in (legend.get_lines(), lines)
    ]
    return looks[0] == looks[1]


NAMES = {
    2: ["rul", "health"],
    3: ["segmentation", "depth", "surface_normals"],
    9: [f"a_task_with_a_long_name_and_more_of_it_{i}" for i in range(9)],
}


@pytest.fixture(params=rest_slow(NAMES, fast=[2]), ids="K={}".format)
def history(request):
    """(norms [T, K], weights [T, K], names) of 120 updates, some 500x apart."""
    num_tasks = request.param
    rng = np.random.default_rng(0)
    norms = np.geomspace(500, 1, num_tasks) * rng.uniform(0.5, 2, (120, num_tasks))
    return norms, rng.dirichlet(np.ones(num_tasks), 120), NAMES[num_tasks]


def test_weights(history):
    _, weights, names = history
    figure = drawn(plot.weights(weights, names, steps=np.arange(0, 1200, 10)))
    (axes,) = figure.axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("task weight", "update")
    for i, line in enumerate(axes.lines):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(0, 1200, 10))
        np.testing.assert_array_equal(line.get_ydata(), weights[:, i])
    (legend,) = figure.legends
    assert len(labels(legend)) == len(names)
    assert explains(legend, axes.lines)
    assert axes.get_ylim() == (-0.02, 1.02)
    if len(names) < 9:
        assert labels(legend) == names


def test_norms_and_their_ratio(history):
    norms, _, names = history
    figure = drawn(plot.norms(norms, names))
    above, below = figure.axes
    assert (above.get_ylabel(), below.get_ylabel()) == ("gradient norm", "largest / smallest")
    assert above.get_yscale() == below.get_yscale() == "log"
    raw, smooth = above.lines[::2], above.lines[1::2]
    assert explains(figure.legends[0], smooth)
    for i in range(len(names)):
        np.testing.assert_array_equal(raw[i].get_ydata(), norms[:, i])
        blocks = norms[:, i].reshape(-1, 2)
        np.testing.assert_allclose(smooth[i].get_ydata(), np.median(blocks, axis=1))
        np.testing.assert_allclose(smooth[i].get_xdata(), np.arange(1, 121, 2) + 0.5)
    np.testing.assert_allclose(below.lines[0].get_ydata(), norms.max(axis=1) / norms.min(axis=1))


def test_contributions_before_and_after(history):
    norms, weights, names = history
    figure = drawn(plot.contributions(norms, weights, names))
    before, after = figure.axes
    assert (before.get_ylabel(), after.get_ylabel()) == ("equal weights", "as weighted")
    assert figure.get_supylabel() == "weight x gradient norm"
    assert before.get_ylim() == after.get_ylim()
    assert before.get_yscale() == after.get_yscale() == "log"
    assert explains(figure.legends[0], before.lines[1::2])
    for i in range(len(names)):
        np.testing.assert_allclose(before.lines[2 * i].get_ydata(), norms[:, i] / len(names))
        np.testing.assert_allclose(after.lines[2 * i].get_ydata(), norms[:, i] * weights[:, i])


def test_shares_against_their_reference(history):
    norms, weights, names = history
    figure = drawn(plot.shares(norms, weights, names))
    above, below = figure.axes
    assert (above.get_ylabel(), below.get_ylabel()) == ("share of norms", "share of contributions")
    for axes, values in ((above, norms), (below, norms * weights)):
        parts = values / values.sum(axis=1, keepdims=True)
        for i in range(len(names)):
            np.testing.assert_allclose(axes.lines[2 * i].get_ydata(), parts[:, i])
        assert axes.lines[-1].get_ydata() == [1 / len(names)] * 2
    assert labels(figure.legends[0])[-1] == "reference"
    assert explains(figure.legends[0], [*above.lines[1 : 2 * len(names) : 2], above.lines[-1]])
    wanted = np.arange(1, len(names) + 1) / sum(range(1, len(names) + 1))
    (axes, _) = drawn(plot.shares(norms, weights, names, reference=wanted)).axes
    levels = [line.get_ydata()[0] for line in axes.lines[2 * len(names) :]]
    np.testing.assert_allclose(levels, wanted)


@pytest.mark.parametrize("num_tasks", NAMES)
def test_cosine_matrix(num_tasks):
    cosines = np.corrcoef(np.random.default_rng(0).normal(size=(num_tasks, 5)))
    figure = drawn(plot.cosine_matrix(cosines, NAMES[num_tasks]))
    axes, scale = figure.axes
    np.testing.assert_array_equal(axes.images[0].get_array(), cosines)
    assert axes.images[0].get_clim() == (-1, 1)
    assert scale.get_ylabel() == "cosine"
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == ([f"{c:.2f}" for c in cosines.flat] if num_tasks < 9 else [])
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert len(ticks) == num_tasks
        assert ticks[0].get_text()[:3] == NAMES[num_tasks][0][:3]


@pytest.mark.parametrize(("beta", "start", "target"), [(0.99, 0, 1), (0.5, 0.9, 0.1)])
def test_step_response(beta, start, target):
    (axes,) = drawn(plot.step_response(beta, start=start, target=target)).axes
    curve, level, half, constant, settled = axes.lines
    at = curve.get_xdata()
    np.testing.assert_allclose(curve.get_ydata(), target + (start - target) * beta**at)
    assert list(level.get_ydata()) == [target, target]
    left = [(line.get_ydata()[0] - target) / (start - target) for line in (half, constant, settled)]
    np.testing.assert_allclose(left[:2], [0.5, np.exp(-1)])
    assert left[2] <= 0.02 < left[2] / beta
    assert labels(axes.get_legend())[2] == f"50 %: {np.log(0.5) / np.log(beta):.3g} updates"


# Machado, Oliveira and Fernandes 2009, severity 1, in linear RGB.
SEEN_AS = {
    "everyone": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(linear):
    """CIE L*a*b* (D65) of linear RGB."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.transpose(to_xyz) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("eyes", SEEN_AS)
def test_colours_are_told_apart(eyes):
    rgb = np.array([matplotlib.colors.to_rgb(color) for color in (*plot.COLORS, "white")])
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    seen = lab(np.clip(linear @ np.transpose(SEEN_AS[eyes]), 0, 1))
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 10  # 2.3 is just noticeable


def test_every_task_has_a_line_of_its_own():
    assert len({tuple(_drawing.line(i).values()) for i in range(28)}) == 28


def test_the_style_of_the_caller_stays_and_does_not_matter():
    weights = np.full((3, 2), 0.5)
    plain = plot.weights(weights, ["a", "b"]).axes[0].xaxis.label.get_fontsize()
    with matplotlib.rc_context({"font.size": 30, "axes.labelsize": 30}):
        assert plot.weights(weights, ["a", "b"]).axes[0].xaxis.label.get_fontsize() == plain
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.slow
def test_pyplot_is_not_needed():
    code = (
        "import sys, numpy as np; from gaba_jax import plot;"
        "plot.weights(np.ones((3, 2)), ['a', 'b']).savefig(__import__('io').BytesIO());"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_does_not_fit():
    two = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"task_weights must be \[T, K\] with K = 3 names"):
        plot.weights(two, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"steps must number the 4 updates; got .* \(3,\)"):
        plot.norms(two, ["a", "b"], steps=[1, 2, 3])
    with pytest.raises(ValueError, match=r"shapes \(4, 2\) and \(3, 2\)"):
        plot.contributions(two, two[1:], ["a", "b"])
    with pytest.raises(ValueError, match=r"reference must be \[2\] shares"):
        plot.shares(two, two, ["a", "b"], reference=[1.0])
    with pytest.raises(ValueError, match=r"must be \[K, K\] with K = 2 .* \(4, 2\)"):
        plot.cosine_matrix(two, ["a", "b"])
    with pytest.raises(ValueError, match="beta=0 must be in"):
        plot.step_response(0)
    with pytest.raises(ValueError, match="there is no jump"):
        plot.step_response(0.9, start=1.0)


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
    assert weight_axes.get_ylim() == (-0.02, 1.02)
    assert explains(norm_axes.get_legend(), norm_axes.lines[1::2])
    assert explains(weight_axes.get_legend(), weight_axes.lines)
    for axes, labels in [
        (norm_axes, ["rul", "health"]),
        (ratio_axes, ["gradients", "weighted"]),
        (weight_axes, ["rul", "health"]),
    ]:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
        assert axes.get_xlabel() == "update"


def logged(norms, weights, names, prefix=""):
    """Dicts as balance_metrics returns them, with what else a run logs."""
    rows = []
    for t, (norm, weight) in enumerate(zip(norms, weights, strict=True)):
        found = monitor.task_metrics(weight, norm, names)
        rows.append({prefix + key: float(value) for key, value in found.items()} | {"loss": t})
    return rows


def test_history_of_what_was_logged(history):
    norms, weights, names = history
    figure = drawn(plot.history(logged(norms, weights, names), steps=np.arange(0, 1200, 10)))
    weight_axes, norm_axes, contribution_axes = figure.axes
    assert contribution_axes.get_xlabel() == "update"
    assert norm_axes.get_yscale() == contribution_axes.get_yscale() == "log"
    assert explains(figure.legends[0], weight_axes.lines)
    for i, line in enumerate(weight_axes.lines):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(0, 1200, 10))
        np.testing.assert_allclose(line.get_ydata(), weights[:, i], rtol=1e-6)
    for axes, values in ((norm_axes, norms), (contribution_axes, norms * weights)):
        for i in range(len(names)):
            np.testing.assert_allclose(axes.lines[2 * i].get_ydata(), values[:, i], rtol=1e-6)


def test_history_of_one_of_several_states():
    two = np.array([[1.0, 2.0], [3.0, 0.0]])
    figure = drawn(plot.history(logged(two, two, ["a/b", "c"], "0/"), prefix="0/"))
    assert labels(figure.legends[0]) == ["a/b", "c"]
    assert np.isnan(figure.axes[1].lines[2].get_ydata()[1])


def test_history_needs_the_keys_of_a_run():
    rows = logged(np.ones((2, 2)), np.ones((2, 2)), ["a", "b"])
    with pytest.raises(ValueError, match=r"with keys weight/\.\.\.; got \['loss'\]"):
        plot.history([{"loss": 1.0}])
    with pytest.raises(ValueError, match="got none"):
        plot.history([])
    del rows[1]["norm/b"]
    with pytest.raises(ValueError, match="not every update in metrics has the key 'norm/b'"):
        plot.history(rows)


def test_history_of_a_scan():
    norms = np.random.default_rng(0).uniform(1, 2, (30, 2))
    stacked = monitor.task_metrics(norms / 4, norms, ["a", "b"])
    one, other = plot.history(stacked), plot.history(logged(norms, norms / 4, ["a", "b"]))
    for axes, same in zip(one.axes, other.axes, strict=True):
        for line, other_line in zip(axes.lines, same.lines, strict=True):
            np.testing.assert_allclose(line.get_ydata(), other_line.get_ydata(), rtol=1e-6)


def test_zero_norms_leave_gaps():
    norms = np.array([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    figure = drawn(plot.balance_history(norms, np.full((3, 2), 0.5), ["a", "b"]))
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), [np.nan, 2, np.nan])


@pytest.mark.parametrize("silent", rest_slow([[0, 1], [1]], fast=[[1]]), ids=["all", "one"])
def test_tasks_without_a_gradient(silent):
    norms = np.ones((100, 2))
    norms[:, silent] = 0  # as a rule that measures nothing records it
    weights, names = np.full((100, 2), 0.5), ["a", "b"]
    for figure in (
        plot.norms(norms, names),
        plot.contributions(norms, weights, names),
        plot.balance_history(norms, weights, names),
    ):
        lines = drawn(figure).axes[0].lines
        assert np.isnan(lines[3].get_ydata()).all()
        assert np.isnan(lines[1].get_ydata()).all() == (0 in silent)


def test_medians_do_not_bridge_a_gap():
    norms = np.ones((100, 2))
    norms[40:60, 0] = 0
    above, _ = plot.norms(norms, ["a", "b"]).axes
    expected = np.where(norms[::2, 0] > 0, 1, np.nan)
    np.testing.assert_array_equal(above.lines[1].get_ydata(), expected)


@pytest.mark.slow
def test_weights_that_learned_to_be_negative_pull_as_hard():
    norms, weights = np.full((50, 2), 3.0), np.tile([-0.5, 4.0], (50, 1))
    _, after = drawn(plot.contributions(norms, weights, ["a", "b"])).axes
    np.testing.assert_allclose(after.lines[0].get_ydata(), 1.5)
    for figure in (
        plot.balance_history(norms, weights, ["a", "b"]),
        plot.weights(weights, ["a", "b"]),
    ):
        low, high = drawn(figure).axes[-1].get_ylim()
        assert low < -0.5
        assert high > 4
    ratio = plot.balance_history(norms, weights, ["a", "b"]).axes[1].lines[2]
    np.testing.assert_allclose(ratio.get_ydata(), 8)


def test_one_update_is_seen():
    one = np.array([[0.3, 0.7]])
    for figure in (
        plot.weights(one, ["a", "b"]),
        plot.norms(one, ["a", "b"]),
        plot.balance_history(one, one, ["a", "b"]),
    ):
        assert any(line.get_marker() == "." for line in figure.axes[-1].lines)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"K = 3 names.*\(4, 2\)"):
        plot.balance_history(np.ones((4, 2)), np.ones((4, 2)), ["a", "b", "c"])


def test_a_learning_curve_for_each_loss():
    losses = np.geomspace([1000.0, 2.0], [10.0, 0.1], 500)
    panels = drawn(plots.learning_curves(losses, ["rul", "health"])).axes
    assert [axes.get_ylabel() for axes in panels] == ["rul loss", "health loss"]
    for i, axes in enumerate(panels):
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), losses[:, i])
        assert axes.get_yscale() == "log"
    drawn(plots.learning_curves(losses[:1], ["rul", "health"]))


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
