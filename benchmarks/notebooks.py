"""Runs notebooks and stores their outputs: ``python -m benchmarks.notebooks [NAME ...]``.

``notebooks/NAME.py`` is what is edited, ``NAME.ipynb`` what this makes of it; all by default.
Widgets are not stored: without a kernel they would open as an error, and a picture stands for each.
"""

from pathlib import Path

import jupytext
import nbclient
import tyro

FOLDER = Path(__file__).parent.parent / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"


def main(names: tyro.conf.Positional[tuple[str, ...]] = ()) -> None:
    """Runs and stores.

    Args:
      names: of the notebooks, without an ending.
    """
    for source in sorted(FOLDER.glob("*.py")):
        if names and source.stem not in names:
            continue
        notebook = jupytext.read(source)
        resources = {"metadata": {"path": str(FOLDER)}}
        nbclient.NotebookClient(
            notebook, resources=resources, record_timing=False, store_widget_state=False
        ).execute()
        for i, cell in enumerate(notebook.cells):
            cell.id = f"cell-{i}"
            for output in cell.get("outputs", []):
                output.get("data", {}).pop(WIDGET, None)
        jupytext.write(notebook, source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb"))


if __name__ == "__main__":
    tyro.cli(main)
