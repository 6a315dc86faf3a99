"""Builds the documentation: ``sphinx-build -W --keep-going -b html docs docs/_build/html``.

Nothing is fetched, neither to build nor to read: formulas become MathML here, fonts are the
reader's own, and the search index is part of the pages.

What only a build needs is imported in it: doctests import this module without the extra ``docs``.
"""

import shutil
from importlib.metadata import version as version_of
from pathlib import Path

DOCS = Path(__file__).parent
NOTEBOOKS = DOCS / "notebooks"  # copies of ../notebooks, while a build runs

project = "gaba_jax"
author = "The gaba_jax authors"
project_copyright = author
version = release = version_of("gaba-jax")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
suppress_warnings = []

myst_enable_extensions = ["attrs_block", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks hold their outputs

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes, units and defaults
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = "furo"
html_title = "gaba_jax"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_show_search_summary = False  # it would fetch the pages, which browsers refuse from a disk
html_math_renderer = "mathml"
html_theme_options = {
    # Both hold a contrast of 4.5 on their backgrounds.
    "light_css_variables": {"color-brand-primary": "#00588c", "color-brand-content": "#00588c"},
    "dark_css_variables": {"color-brand-primary": "#6bb8ec", "color-brand-content": "#6bb8ec"},
}


def mathml(formula: str, display: str) -> str:
    """A formula that browsers render by themselves."""
    from latex2mathml.converter import convert

    formula = formula.replace("{aligned}", "{split}")  # the one that the converter knows
    return convert(formula, display=display)


def visit_inline(translator, node) -> None:
    from docutils import nodes

    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block(translator, node) -> None:
    from docutils import nodes

    formula = node.astext()
    if r"\\" in formula and r"\begin" not in formula:
        formula = rf"\begin{{split}}{formula}\end{{split}}"
    translator.body.append(f'<div class="math">{mathml(formula, "block")}</div>')
    raise nodes.SkipNode


def replace_in_attributes(old: str, new: str):
    """Napoleon takes what is before a colon for a type; in these docstrings it is a sentence."""

    def process(app, what: str, name: str, obj, options, lines: list[str]) -> None:
        if what in ("attribute", "data"):
            lines[:] = [line.replace(old, new) for line in lines]

    return process


def join_returns(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Likewise under Returns: the two parts of the sentence belong together."""
    for type_ in [line for line in lines if line.startswith(":rtype: ")]:
        lines.remove(type_)
        first = next(i for i, line in enumerate(lines) if line.startswith(":returns: "))
        sentence = type_.removeprefix(":rtype: ")
        lines[first] = lines[first].replace(":returns: ", f":returns: {sentence}: ", 1)


def tidy(app, doctree) -> None:
    """Drops the empty line that ends a doctest's block, and pictures from elsewhere."""
    from docutils import nodes

    for block in doctree.findall(nodes.literal_block):
        code = block.astext().rstrip("\n")
        block.rawsource, block.children = code, []
        block += nodes.Text(code)
    for image in list(doctree.findall(nodes.image)):
        if "://" in image["uri"]:  # a notebook's badge: its words will do without a network
            image.replace_self(nodes.Text(image.get("alt", "")))


def copy_notebooks(app, config) -> None:
    """Sphinx reads what is under docs; the notebooks live beside it."""
    notebooks = sorted((DOCS.parent / "notebooks").glob("*.ipynb"))
    if not notebooks:  # a list of none is a warning
        config.exclude_patterns.append("notebooks.*")
        config.suppress_warnings.append("toc.excluded")
    for notebook in notebooks:
        NOTEBOOKS.mkdir(exist_ok=True)
        shutil.copy2(notebook, NOTEBOOKS)


def remove_notebooks(app, exception: Exception | None) -> None:
    shutil.rmtree(NOTEBOOKS, ignore_errors=True)


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    # Around napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", replace_in_attributes(": ", "\0 "), priority=400)
    app.connect("autodoc-process-docstring", replace_in_attributes("\0 ", ": "), priority=600)
    app.connect("autodoc-process-docstring", join_returns, priority=600)
    app.connect("doctree-read", tidy)
    app.connect("config-inited", copy_notebooks)
    app.connect("build-finished", remove_notebooks)
