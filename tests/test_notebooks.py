"""The notebooks: both halves of a pair say the same, what is stored is whole, and they run.

Executed with ``GABA_JAX_FAST`` set, on a small budget, without a warning that a reader would see; a
last cell of asserts in each holds its text to account.
"""

import ast
import base64
import os
import struct
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

# Imported where they are used: nbformat alone takes three seconds, and every run collects this.
pytestmark = pytest.mark.skipif(
    find_spec("jupytext") is None or find_spec("nbclient") is None,
    reason="needs the extra notebooks",
)

FOLDER = Path(__file__).parent.parent / "notebooks"
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/gaba-jax/gaba_jax/blob/main/notebooks/{})"
)
LARGEST = 400 * 1024
SECONDS = 300  # per notebook: a busy machine is no failure, a loop without end is

each = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(path, folder):
    """A copy of the notebook, run in ``folder`` from an empty start; its own outputs."""
    import nbclient

    notebook = read(path)
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}
    )
    client.km = client.create_kernel_manager()
    with tempfile.TemporaryDirectory() as sockets:  # a short path, and no port is opened
        client.km.transport, client.km.ip = "ipc", f"{sockets}/kernel"
        client.execute(env=os.environ | {"GABA_JAX_FAST": "1", "PYTHONPATH": str(FOLDER.parent)})
    return notebook


def test_there_are_the_four_notebooks():
    expected = {"balancing_explorer", "physics_informed", "quickstart", "turbofan"}
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == expected
    assert {path.stem for path in FOLDER.glob("*.py")} == expected


@pytest.mark.slow
@each
def test_both_halves_have_the_same_cells(path):
    import jupytext

    notebook = read(path)
    source = jupytext.read(path.with_suffix(".py"))
    assert notebook.metadata.jupytext.formats == "ipynb,py:percent"
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ]


@pytest.mark.slow
@each
def test_what_is_stored_was_run_from_top_to_bottom(path):
    assert path.stat().st_size < LARGEST
    import nbformat

    notebook = read(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    for picture in pictures:
        header = base64.b64decode(picture)[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert max(struct.unpack(">II", header[16:])) <= 1600


@pytest.mark.slow
@each
def test_it_opens_in_colab_and_says_how_to_install_what_is_missing(path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown"
    assert BADGE.format(path.name) in cells[0].source
    first = code_cells(read(path))[0].source
    guard, *others = ast.parse(first).body
    assert isinstance(guard, ast.Try)
    assert [ast.unparse(line) for line in guard.body] == ["import gaba_jax"]
    (handler,) = guard.handlers
    assert ast.unparse(handler.type) == "ModuleNotFoundError"
    assert "pip" in ast.unparse(handler)
    assert not any("pip" in ast.unparse(line) for line in others)
    assert "In a checkout of it: pip install -e" in ast.unparse(handler)


def check_run(path, folder):
    notebook = execute(path, folder)
    for cell in code_cells(notebook):
        assert not [o for o in cell.outputs if o.get("name") == "stderr"], cell.outputs
    assert "pip" not in str(code_cells(notebook)[0].outputs)
    last = code_cells(notebook)[-1]
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(last.source)))


@pytest.mark.slow
@each
def test_it_runs(path, tmp_path, monkeypatch):
    """Without the public data, as for a reader who has none."""
    monkeypatch.setenv("GABA_JAX_SHARED", str(tmp_path))
    check_run(path, tmp_path)


@pytest.mark.slow
def test_turbofan_runs_on_the_public_data():
    """Where it is; a copy of the test above where it is not."""
    check_run(FOLDER / "turbofan.ipynb", FOLDER)
