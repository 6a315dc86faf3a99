"""The explorer in JupyterLab, driven by the keyboard of a headless Chromium."""

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
                 each.querySelector(".mod-active").textContent.trim()])))"""


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
    return {
        "contribution, uniform": norms / 2,
        "weight, square root": square_root,
        "contribution, square root": square_root * norms,
        "contribution, GABA": np.prod(norms) / np.sum(norms) * np.ones(2),
    }


def of_panel_c(values, numbers):
    ticked = [np.float64(numbers[f"norm, {leaf}"]) for leaf, on in values.items() if on]
    norms = np.linalg.norm(ticked, axis=0)
    weights = controller.control(norms)
    return {"norm": norms, "weight": weights, "contribution": weights * norms}


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
    ratio = {"equal": 1, "10x": 10, "500x": 500, "2400x": 2400}[values["norms"]]
    norms = np.array([ratio, 1.0])
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
    "explorer-b": (of_panel_b, (slide, "norm of health", "ArrowLeft", "ArrowLeft")),
    "explorer-c": (of_panel_c, (tick, "health_head.kernel"), (tick, "backbone.last.bias")),
    "explorer-d": (
        of_panel_d,
        (slide, "alpha", "ArrowUp", "ArrowUp"),
        (slide, "published step", "ArrowLeft"),
    ),
    "explorer-e": (of_panel_e, (choose, "2400x"), (slide, "update", "PageUp", "ArrowRight")),
    "explorer-f": (of_panel_f, (slide, "tasks, K", "ArrowRight"), (choose, "all 1")),
}


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
            or not np.allclose(np.float64(shown[name]), values, rtol=2e-5, atol=1e-9)
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
