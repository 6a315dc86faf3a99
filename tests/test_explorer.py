"""The explorer: its panels by themselves, and in JupyterLab by a headless Chromium's keyboard."""

import ast
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import controller, weighting

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "balancing_explorer.ipynb"
PATIENCE = 120  # seconds, for whatever is polled
READ_NUMBERS = """root => Object.fromEntries([...root.querySelectorAll("tr[data-name]")].map(
    row => [row.dataset.name, [...row.cells].slice(1).map(cell => cell.textContent)]))"""
READ_PICTURE = "picture => picture.outerHTML"
READ_CONTROLS = """root => Object.fromEntries(
    [...root.querySelectorAll(".widget-slider")].map(
        each => [each.querySelector(".widget-label").textContent,
                 Number(each.querySelector(".widget-readout").textContent)]).concat(
    [...root.querySelectorAll(".widget-checkbox")].map(
        each => [each.textContent.replace("\\u200b", "").trim(),
                 each.querySelector("input").checked])).concat(
    [...root.querySelectorAll(".widget-toggle-buttons")].map(
        each => [each.querySelector(".widget-label").textContent,
                 each.querySelector(".mod-active")?.textContent.trim()])))"""


def wait_for(check, why_not):
    """Asks ``check()`` again and again; at the end of patience fails with ``why_not()``."""
    end = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < end, f"not within {PATIENCE} s: {why_not()}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def chromium():
    """Its path; without it, or what drives it, the tests are skipped, and fail in CI."""
    modules = ("playwright", "jupyterlab", "ipywidgets")
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    path = shutil.which("chromium")
    if missing or path is None:
        reason = f"needs {', '.join(missing) or 'chromium (apt-get install chromium)'}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return path


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """The address of a JupyterLab of its own, which knows this notebook and no user's settings."""
    home = tmp_path_factory.mktemp("lab")
    (home / "work").mkdir()
    shutil.copy(NOTEBOOK, home / "work")
    settings = {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page
    }
    for name, values in settings.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    places = {
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
    ]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={home / 'work'}"]
    command += ["--LabApp.extension_manager=readonly"]
    log = home / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {name: str(home / place) for name, place in places.items()},
        )
    address = f"http://127.0.0.1:{port}"

    def answers():
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/status"):
            return True
        return False

    try:
        wait_for(answers, log.read_text)
        yield address
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def page(chromium, lab):
    """The notebook, opened and run, in a browser that reaches nothing but the server."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE * 1000)
        page.route("**", lambda r: r.continue_() if r.request.url.startswith(lab) else r.abort())
        page.goto(f"{lab}/lab/tree/{NOTEBOOK.name}")
        wait_until_idle(page)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        errors = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
        page.locator(".explorer-f tr[data-name]").or_(errors).first.wait_for()
        wait_until_idle(page)
        assert not errors.all_text_contents()
        yield page
        browser.close()


def wait_until_idle(page):
    """By the status bar: the notebook's own sign is that of rest before there is a kernel."""
    page.get_by_text(re.compile(r"^Python 3.*\| Idle$")).wait_for()


def slide(page, panel, name, *keys):
    """Presses arrow keys on the slider, which answers by a value of its own."""
    slider = page.locator(f".{panel} .widget-slider").filter(
        has=page.locator(".widget-label", has_text=name)
    )
    readout = slider.locator(".widget-readout")
    slider.locator(".noUi-handle").focus()
    for key in keys:
        before = readout.text_content()
        page.keyboard.press(key)
        wait_for(
            lambda before=before: readout.text_content() != before,
            lambda key=key: f"{panel}, {name}: {key} moves nothing",
        )


def tick(page, panel, name):
    page.locator(f".{panel} .widget-checkbox", has_text=name).locator("input").focus()
    page.keyboard.press("Space")


def choose(page, panel, name):
    page.locator(f".{panel} .widget-toggle-button", has_text=name).focus()
    page.keyboard.press("Enter")


def pair(values, name):
    return np.array([values[f"{name} of RUL"], values[f"{name} of health"]])


def of_panel_a(values, numbers):
    norms = pair(values, "norm")
    closed, beta, warmup = controller.control(norms), values["beta"], int(values["warm-up"])
    late = controller.step_response(200 - warmup, start=0.5, target=closed, beta=beta)
    return {
        "norm": norms,
        "share": controller.share(norms),
        "weight, closed form": closed,
        "weight, update 200": controller.saturation(late, min_weight=values["floor"]),
        "contribution, closed form": closed * norms,
        "updates to settle (2 %)": [warmup + controller.settling_steps(beta)],
    }


def of_panel_b(values, numbers):
    norms = pair(values, "norm")
    square_root = controller.control(np.sqrt(norms))
    own = values["weight of RUL, λ"] * np.array([1, -1]) + [0, 1]
    return {
        "weight, yours": own,
        "contribution, yours": own * norms,
        "RUL / health, yours": [own[0] * norms[0] / (own[1] * norms[1])],
        "contribution, uniform": norms / 2,
        "weight, square root": square_root,
        "contribution, square root": square_root * norms,
        "contribution, GABA": np.prod(norms) / np.sum(norms) * np.ones(2),
    }


def of_panel_c(values, numbers):
    leaves = [name.removeprefix("square, ") for name in numbers if name.startswith("square, ")]
    ticked = [values[leaf] * np.float64(numbers[f"square, {leaf}"]) for leaf in leaves]
    totals = np.cumsum(ticked, axis=0)
    norms = np.sqrt(totals[-1])
    weights = controller.control(norms)
    running = {f"total to {leaf}": total for leaf, total in zip(leaves, totals, strict=True)}
    return running | {"norm": norms, "weight": weights, "contribution": weights * norms}


def of_panel_d(values, numbers):
    norms, progress = pair(values, "norm"), pair(values, "progress")
    alpha, start = values["alpha"], np.ones(2)
    by_step = weighting.gradnorm(
        2,
        alpha=alpha,
        variant="published",
        weight_optimizer=optax.sgd(values["published step"]),
        initial_losses=start,
    )
    stats = weighting.TaskStats(
        *(jnp.asarray(norms), None, jnp.asarray(progress), jnp.ones(2, bool), jnp.int32(1))
    )
    _, state = by_step.update(stats, by_step.init())
    return {
        "weight, GABA": controller.control(norms),
        "weight, balance point": weighting.gradnorm_balance_point(norms, progress, start, alpha),
        "published, weight after one step": state.learned_weights,
    }


def of_panel_e(values, numbers):
    norms = pair(values, "norm")
    after = max(int(values["update"]) - 100, 0)
    wanted = controller.control(norms)
    average = controller.step_response(after, start=0.5, target=wanted, beta=values["beta"])
    applied = controller.saturation(average, min_weight=values["floor"])
    return {
        "share": controller.share(norms),
        "error": controller.error(norms),
        "weight, controller": wanted,
        "weight, average": average,
        "weight, applied": applied,
        "contribution": applied * norms,
    }


def of_panel_f(values, numbers):
    num_tasks, least = int(values["tasks, K"]), values["floor"]
    graded = values["other norms"] == "graded"
    norms = np.geomspace(values["largest norm"], 1, num_tasks) if graded else np.ones(num_tasks)
    norms[0] = values["largest norm"]
    closed = controller.control(norms)
    projected = controller.saturation(closed, min_weight=least, floor="project")
    return {
        "norm": norms,
        "weight, closed form": closed,
        "weight, renormalize": controller.saturation(closed, min_weight=least),
        "weight, project": projected,
        "least weight, project": [projected.min()],
        "true bound of renormalize": [least / (1 + (num_tasks - 1) * least)],
    }


PANELS = {
    "explorer-a": (
        of_panel_a,
        (slide, "norm of RUL", "ArrowRight", "ArrowRight", "ArrowRight"),
        (slide, "warm-up", "ArrowLeft"),
    ),
    "explorer-b": (
        of_panel_b,
        (slide, "norm of health", "ArrowLeft"),
        (slide, "weight of RUL", "ArrowLeft"),
    ),
    "explorer-c": (of_panel_c, (tick, "health_head.kernel"), (slide, "update", "PageUp")),
    "explorer-d": (
        of_panel_d,
        (slide, "alpha", "ArrowUp", "ArrowUp"),
        (slide, "published step", "ArrowRight"),
    ),
    "explorer-e": (
        of_panel_e,
        (choose, "2,400x"),
        (slide, "norm of health", "ArrowRight"),
        (slide, "update", "PageUp", "ArrowRight"),
    ),
    "explorer-f": (of_panel_f, (slide, "tasks, K", "ArrowRight"), (choose, "all 1")),
}


@pytest.fixture(scope="module")
def panels():
    """By name, from the notebook's code run here: to be moved and read without a browser."""
    pytest.importorskip("ipywidgets")
    found = []
    code = ast.parse(NOTEBOOK.with_suffix(".py").read_text())
    for line in code.body:
        if isinstance(line, ast.Expr) and ast.unparse(line).startswith("Panel("):
            line.value = ast.Call(ast.Name("keep", ast.Load()), [line.value], [])
    exec(compile(ast.fix_missing_locations(code), NOTEBOOK.stem, "exec"), {"keep": found.append})
    return {panel.css_class: panel for panel in found}


def numbers_of(panel):
    rows = re.findall(r'<tr data-name="([^"]*)">(.*?)</tr>', panel.numbers.value)
    cells = {name: re.findall(r"<td style[^>]*>([^<]*)</td>", row) for name, row in rows}
    return {name: np.float64(each) for name, each in cells.items() if re.match("[-0-9.]+", each[0])}


@contextlib.contextmanager
def moved(panel, **values):
    """The controls, set one after the other; back as they were at the end."""
    before = {name: panel.controls[name].value for name in values}
    try:
        for name, value in values.items():
            panel.controls[name].value = value
        yield numbers_of(panel)
    finally:
        for name, value in before.items():
            panel.controls[name].value = value


def ends(control):
    """The values at both ends of a control."""
    if hasattr(control, "base"):
        return control.base**control.min, control.base**control.max
    if hasattr(control, "min"):
        return control.min, control.max
    if hasattr(control, "options"):
        given = [each[1] if isinstance(each, tuple) else each for each in control.options]
        given = list(control.options.values()) if isinstance(control.options, dict) else given
        return given[0], given[-1]
    return False, True


def texts_outside(figure):
    """What is written over an edge of the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    agg = FigureCanvasAgg(figure)
    agg.draw()
    beyond = set()  # labels of ticks outside the limits, which are not drawn
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                beyond |= {tick.label1, tick.label2}
    outside = []
    for text in figure.findobj(lambda each: isinstance(each, Text) and each.get_visible()):
        area = text.get_window_extent(agg.get_renderer())
        within = area.x0 >= 0 and area.y0 >= 0
        within &= area.x1 <= figure.bbox.width and area.y1 <= figure.bbox.height
        if text.get_text().strip() and text not in beyond and not within:
            outside.append(text.get_text())
    return outside


@pytest.mark.slow
@pytest.mark.parametrize("letter", "abcdef")
def test_a_picture_says_its_settings_and_writes_over_no_edge(panels, letter):
    panel = panels[f"explorer-{letter}"]
    for name, control in panel.controls.items():
        for value in ends(control):
            with moved(panel, **{name: value}):
                if "refused" in panel.numbers.value:
                    continue
                if isinstance(panel.drawn, str):
                    said = " ".join(re.findall(r'<tspan x="12"[^>]*>([^<]*)', panel.image))
                else:
                    assert not texts_outside(panel.drawn), (name, value)
                    said = " ".join(text.get_text() for text in reversed(panel.drawn.texts))
                said = " ".join(said.split())
                assert all(" ".join(each.split()) in said for each in panel.settings()), said
                assert all(each in panel.alt for each in panel.settings())


@pytest.mark.slow
@pytest.mark.parametrize("norm", [0.001, 1.0, 1000.0])
def test_task_balancing_reaches_a_thousandth(panels, norm):
    with moved(panels["explorer-a"], norm_1=norm, norm_2=0.001) as numbers:
        expected = controller.control(np.array([norm, 0.001]))
        np.testing.assert_allclose(numbers["weight, closed form"], expected, rtol=1e-4)
        balanced = numbers["contribution, closed form"]
        np.testing.assert_allclose(balanced[0], balanced[1], rtol=1e-4)


@pytest.mark.slow
def test_the_weight_is_dragged_to_the_crossing(panels):
    panel = panels["explorer-b"]
    weights = np.array([value for _, value in panel.controls["weight_1"].options])
    norms = numbers_of(panel)["norm"]
    ratios = []
    for weight in weights[::10]:
        with moved(panel, weight_1=weight) as numbers:
            ratios.append(numbers["RUL / health, yours"][0])
    expected = weights / (1 - weights) * norms[0] / norms[1]
    np.testing.assert_allclose(ratios, expected[::10], rtol=2e-3)
    nearest = weights[np.abs(np.log(expected)).argmin()]
    with moved(panel, weight_1=nearest) as numbers:
        assert 0.89 < numbers["RUL / health, yours"] < 1.13  # half a step of the slider
        np.testing.assert_allclose(
            numbers["contribution, yours"], numbers["contribution, GABA"], rtol=0.13
        )


@pytest.mark.slow
@pytest.mark.parametrize("update", [1, 40])
def test_leaf_by_leaf_squares_add_up_to_the_norms_square(panels, update):
    panel = panels["explorer-c"]
    leaves = [name for name in panel.controls if name != "update"]
    for off in ([], leaves[:2], leaves[2:]):
        ticks = {leaf: leaf not in off for leaf in leaves}
        with moved(panel, update=update, **ticks) as numbers:
            total = np.zeros(2)
            for leaf in leaves:
                total = total + ticks[leaf] * numbers[f"square, {leaf}"]
                np.testing.assert_allclose(numbers[f"total to {leaf}"], total, rtol=1e-4)
            np.testing.assert_allclose(numbers["norm"], np.sqrt(total), rtol=1e-4)


@pytest.mark.slow
def test_without_a_leaf_the_panel_says_so_and_recovers(panels):
    panel = panels["explorer-c"]
    leaves = [name for name in panel.controls if name != "update"]
    before = panel.numbers.value
    with moved(panel, **dict.fromkeys(leaves, False)) as numbers:
        assert "refused" in panel.numbers.value or not numbers["norm"].any()
    assert panel.numbers.value == before


@pytest.mark.slow
def test_gradnorm_opens_with_both_tasks_on_one_scale_and_all_of_it_in_view(panels):
    axes = panels["explorer-d"].drawn.axes
    assert [each.get_title(loc="left") for each in axes[:3]] == [
        *("GABA", "GradNorm", "GradNorm, published")
    ]
    for row in (axes[:3], axes[3:]):
        low, high = row[0].get_ylim()
        for each in row:
            assert each.get_ylim() == (low, high)
            assert [line.get_label() for line in each.lines] == ["RUL", "health"]
            for line in each.lines:
                assert np.all((low < line.get_ydata()) & (line.get_ydata() < high))


@pytest.mark.slow
def test_a_published_step_too_large_is_named(panels):
    with moved(panels["explorer-d"], optimizer="SGD 0.02", step=10**-0.3) as numbers:
        assert numbers["published, loss finite until"] < 20
        assert "no number after" in panels["explorer-d"].drawn.axes[5].texts[0].get_text()


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1, 50, 500, 1000, 2400])
def test_a_ratio_sets_the_norms_of_the_loop(panels, ratio):
    panel = panels["explorer-e"]
    with moved(panel, ratio=1.0 if ratio != 1 else 50.0, norm_2=3.0):
        assert panel.controls["ratio"].value is None  # the sliders have left it
        panel.controls["ratio"].value = float(ratio)
        assert (panel.controls["norm_1"].value, panel.controls["norm_2"].value) == (ratio, 1)
        expected = controller.control(np.array([ratio, 1.0]))
        np.testing.assert_allclose(numbers_of(panel)["weight, controller"], expected, rtol=1e-4)
    panel.controls["ratio"].value = 500.0


@pytest.mark.slow
def test_the_loop_has_a_response_curve_that_follows_beta(panels):
    def curve():
        return re.search(r'<image [^>]*href="data:image/png;base64,([^"]*)"', panel.image)[1]

    panel = panels["explorer-e"]
    before = curve()
    with moved(panel, beta=0.9):
        assert curve() != before
    assert curve() == before


def check_panel(page, panel, expect, *actions):
    root = page.locator(f".{panel}")
    picture = root.locator("img, svg[role=img]")

    def differences():
        """Where the numbers are not what the library gives for the values of the controls."""
        shown = root.evaluate(READ_NUMBERS)
        wanted = expect(root.evaluate(READ_CONTROLS), shown)
        return {
            f"{panel}, {name}": (shown.get(name), values)
            for name, values in wanted.items()
            if np.shape(shown.get(name)) != np.shape(values)
            or not np.allclose(np.float64(shown[name]), values, rtol=2e-5, atol=2e-6)
        }

    def settled():
        return not differences()

    wait_for(settled, differences)
    for action, name, *keys in actions:
        numbers, image = root.evaluate(READ_NUMBERS), picture.evaluate(READ_PICTURE)
        action(page, panel, name, *keys)
        wait_for(
            lambda image=image: picture.evaluate(READ_PICTURE) != image,
            lambda name=name: f"{panel}, {name}: the same picture",
        )
        wait_for(settled, differences)
        assert root.evaluate(READ_NUMBERS) != numbers


def test_each_panel_answers_the_keyboard_with_the_librarys_numbers(page):
    # In one test: pytest's processes would start a browser each.
    for panel, arguments in PANELS.items():
        check_panel(page, panel, *arguments)


def test_what_is_stored_is_a_picture_of_each_panel():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    kinds = [set(out["data"]) for cell in cells for out in cell.get("outputs", []) if "data" in out]
    assert sum(bool(kind & {"image/png", "image/svg+xml"}) for kind in kinds) == len(PANELS)
    # Without a kernel a stored widget is an error message.
    assert not any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds)


def test_each_panel_teaches_one_thing_and_its_still_names_its_settings():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    said = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    sections = [text for text in said if re.match(r"## [a-f]\. ", text)]
    assert len(sections) == len(PANELS)
    for text in sections:
        lesson = re.search(r"^\*\*What it teaches:\*\* ([^.]+)\.\n\n", text, re.MULTILINE)
        assert lesson is not None, text
    stills = [
        "".join(o["data"]["text/plain"]) for c in cells for o in c.get("outputs", ()) if "data" in o
    ]
    for panel in PANELS:
        (still,) = [text for text in stills if text.startswith(f"{panel}, at ")]
        assert re.search(r"\d", still)
