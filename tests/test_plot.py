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
    halves = np.full((3, 2), 0.5)

    def size():
        figure = plot.balance_history(halves, halves, ["a", "b"])
        return figure.axes[0].xaxis.label.get_fontsize()

    plain = size()
    with matplotlib.rc_context({"font.size": 30, "axes.labelsize": 30}):
        assert size() == plain
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.slow
def test_pyplot_is_not_needed():
    code = (
        "import sys, numpy as np; from gaba_jax import plot;"
        "ones = np.ones((3, 2));"
        "plot.balance_history(ones, ones, ['a', 'b']).savefig(__import__('io').BytesIO());"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
    np.testing.assert_allclose(norm_axes.lines[1].get_ydata(), norms[:, 0])  # medians of blocks
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
        plot.history(logged(norms, weights, names)),
        plot.balance_history(norms, weights, names),
    ):
        (axes,) = [a for a in drawn(figure).axes if a.get_ylabel() == "gradient norm"]
        lines = axes.lines
        assert np.isnan(lines[3].get_ydata()).all()
        assert np.isnan(lines[1].get_ydata()).all() == (0 in silent)


def test_medians_do_not_bridge_a_gap():
    norms = np.ones((100, 2))
    norms[40:60, 0] = 0
    above = plot.balance_history(norms, np.full((100, 2), 0.5), ["a", "b"]).axes[0]
    expected = np.where(norms[::2, 0] > 0, 1, np.nan)
    np.testing.assert_array_equal(above.lines[1].get_ydata(), expected)


@pytest.mark.slow
def test_weights_that_learned_to_be_negative_pull_as_hard():
    norms, weights = np.full((50, 2), 3.0), np.tile([-0.5, 4.0], (50, 1))
    run = drawn(plot.history(logged(norms, weights, ["a", "b"])))
    np.testing.assert_allclose(run.axes[2].lines[0].get_ydata(), 1.5, rtol=1e-6)
    for axes in (
        drawn(plot.balance_history(norms, weights, ["a", "b"])).axes[-1],
        run.axes[0],
    ):
        low, high = axes.get_ylim()
        assert low < -0.5
        assert high > 4
    ratio = plot.balance_history(norms, weights, ["a", "b"]).axes[1].lines[2]
    np.testing.assert_allclose(ratio.get_ydata(), 8)


def test_one_update_is_seen():
    one = np.array([[0.3, 0.7]])
    for figure in (
        plot.history(logged(one, one, ["a", "b"])),
        plot.balance_history(one, one, ["a", "b"]),
    ):
        assert any(line.get_marker() == "." for line in figure.axes[-1].lines)


def test_wrong_shapes():
    rows = logged(np.ones((4, 2)), np.ones((4, 2)), ["a", "b"])
    with pytest.raises(ValueError, match=r"steps must number the 4 updates; got .* \(3,\)"):
        plot.history(rows, steps=[1, 2, 3])
    with pytest.raises(ValueError, match=r"shapes \(4, 2\) and \(3, 2\)"):
        plot.balance_history(np.ones((4, 2)), np.ones((3, 2)), ["a", "b"])
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
