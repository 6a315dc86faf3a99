"""Builds the documentation: ``sphinx-build -W --keep-going -b html docs docs/_build/html``.

Nothing is fetched, neither to build nor to read: formulas become MathML here, fonts are the
reader's own, and the search index is part of the pages.

What only a build needs is imported in it: doctests import this module without the extra ``docs``.
"""

import re
import shutil
from importlib.metadata import version as version_of
from pathlib import Path

DOCS = Path(__file__).parent
NOTEBOOKS = DOCS / "notebooks"  # copies of ../notebooks, while a build runs
PAGES = "https://github.com/gaba-jax/gaba_jax/blob/main/docs/"  # as notebooks link them
WIDE = 560  # pixels: a picture of more is not made smaller than that
PANELS = {"images/balance.png"}  # three side by side: one by one on a phone

project = "gaba_jax"
author = "The gaba_jax authors"
project_copyright = author
version = release = version_of("gaba-jax")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
suppress_warnings = []

myst_enable_extensions = ["attrs_block", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks hold their outputs
nb_render_markdown_format = "gfm"  # a table is one in an output too

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as they are written: min_weight=...
autodoc_typehints = "none"  # the docstrings say shapes, units and defaults
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

# Not of what is printed. Of the examples in the reference without prompts and output.
copybutton_selector = ", ".join(
    f"div.{kind} pre"
    for kind in ("highlight-python", "highlight-bash", "highlight-default", "cell_input")
)
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

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


# What the converter to MathML leaves as it is.
LEFT = {r"\arg": "arg", r"\|": "‖", r"\_": "_", "\\\n": "\N{NO-BREAK SPACE}"}


def mathml(formula: str, display: str) -> str:
    """A formula that browsers render by themselves.

    The converter sets no space round "log", and too much in "min(a)", "|a|" and "= -a".
    """
    from latex2mathml.converter import convert

    function = r"\\(?:arg|cos|exp|ln|log|max|min|sin|tanh)(?![a-z])"
    subscript = r"(?:_\w|_\{[^{}]*\})?"
    formula = re.sub(rf"({function}{subscript}) *(?=[a-zA-Z0-9\\])", r"\1\\, ", formula)
    formula = re.sub(rf"(?<=[\w)}}]) *(?={function})", r"\\, ", formula)
    formula = formula.replace("{aligned}", "{split}")  # the one that the converter knows
    html = convert(formula, display=display)
    html = re.sub("<mo>([a-z]{2,})</mo>", r"<mi>\1</mi>", html)
    html = re.sub("<mo([^>]*>&#x0007C;)", r'<mo lspace="0" rspace="0"\1', html)
    html = re.sub(r"((?:&#x000(?:28|3D);|\[)</mo><mo)(>&#x02212;)", r'\1 form="prefix"\2', html)
    for left, meant in LEFT.items():
        html = html.replace(left, meant)
    if "\\" in html:
        raise ValueError(f"{formula}: the converter does not know all of it: {html}")
    return html


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


def skip_fields(app, what: str, name: str, obj, skip: bool, options) -> bool | None:
    """Those of a NamedTuple: they are under Attributes, or say nothing of themselves."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field") else None


def init_signature(app, what: str, name: str, obj, options, signature: str, returns: str):
    """That of ``__init__`` for a Flax module: autodoc reads one of its metaclass."""
    from sphinx.util.inspect import signature as signature_of
    from sphinx.util.inspect import stringify_signature

    if what == "class" and signature == "(*args, **kwargs)":
        init = signature_of(obj.__init__, bound_method=True)
        return stringify_signature(init, show_annotation=False), returns
    return None


def tidy(app, doctree) -> None:
    """What is the same on all pages: code, pictures, and links of notebooks to pages.

    Drops the empty line that ends a doctest's block, and pictures from elsewhere. Wide pictures get
    the class ``wide``; those of three panels are there a second time, as three.
    """
    from docutils import nodes
    from sphinx.util.images import get_image_size

    for block in doctree.findall(nodes.literal_block):
        code = block.astext().rstrip("\n")
        block.rawsource, block.children = code, []
        block += nodes.Text(code)
    for image in list(doctree.findall(nodes.image)):
        if "://" in image["uri"]:  # a notebook's badge: its words will do without a network
            image.replace_self(nodes.Text(image.get("alt", "")))
            continue
        image.setdefault("alt", "What the code above draws.")
        if image["uri"] in PANELS:
            for place in ("left", "middle", "right"):
                panel = image.deepcopy()
                panel["classes"] = ["panel", place]
                panel["alt"] = f"{image['alt']}: the {place} panel"
                image.parent.insert(image.parent.index(image), panel)
            image["classes"].append("panels")
            continue
        size = get_image_size(app.srcdir / image["uri"])
        if size is None or size[0] > WIDE:  # a drawing without a size is as wide as the page
            image["classes"].append("wide")
    for link in doctree.findall(nodes.reference):
        before, _, page = link.get("refuri", "").removesuffix(".md").partition(PAGES)
        if not before and page in app.env.found_docs:
            link["refuri"] = app.builder.get_relative_uri(app.env.docname, page)
            link["internal"] = True


def entry(code: str) -> str | None:
    """The full name of the entry that a piece of code leads to: ``upgrad(K)`` to that of upgrad."""
    import gaba_jax

    name = code.partition("(")[0]
    for module in (gaba_jax.weighting, gaba_jax):  # a rule before the transform of its name
        if name in module.__all__:
            return f"{module.__name__}.{name}"
    return None


def link_rules(app, doctree) -> None:
    """On the page that compares the rules, code that is a public name leads to its entry.

    The page itself holds no links to entries: where it is read as Markdown they have no anchors.
    """
    from docutils import nodes
    from sphinx.addnodes import pending_xref

    if app.env.docname != "weightings":
        return
    for code in list(doctree.findall(nodes.literal)):
        name = entry(code.astext())
        if name and not isinstance(code.parent, nodes.reference):
            about = {"refdomain": "py", "reftype": "obj", "reftarget": name, "refwarn": True}
            link = pending_xref("", refdoc=app.env.docname, refexplicit=True, **about)
            code.replace_self(link)
            link += code


def let_names_break(app, pagename: str, template: str, context: dict, doctree) -> None:
    """In tables, between the words of a name, where a column is narrow."""

    def in_text(text: re.Match[str]) -> str:
        return re.sub(r"(?<=\w[_.,:=])(?=[a-z])", "<wbr>", text[0])

    def in_cell(cell: re.Match[str]) -> str:
        return re.sub(r">[^<]+", in_text, cell[0])

    if "body" in context:
        context["body"] = re.sub(r"<td.*?</td>", in_cell, context["body"], flags=re.DOTALL)


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
    app.connect("autodoc-process-signature", init_signature)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("doctree-read", tidy)
    app.connect("doctree-read", link_rules)
    app.connect("html-page-context", let_names_break)
    app.connect("config-inited", copy_notebooks)
    app.connect("build-finished", remove_notebooks)
