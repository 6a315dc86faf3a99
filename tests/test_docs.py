"""The documentation: every public name, pages that are reached, links that lead somewhere.

Code on the pages is run by test_pages.py; that they build without a warning is the build's to say.
"""

import ast
import contextlib
import importlib
import inspect
import io
import pkgutil
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gaba_jax
from benchmarks import docs_pages, large_models, performance
from gaba_jax.turbofan.config import rules
from tests import pages

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONF = runpy.run_path(str(DOCS / "conf.py"))
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}


def public_modules():
    """The names of all modules, the package itself first."""
    found = pkgutil.walk_packages(gaba_jax.__path__, "gaba_jax.")
    names = [module.name for module in found]
    return ["gaba_jax", *(n for n in names if not re.search(r"\._", n))]


def public_names(module):
    """``__all__``; without one the functions, classes and constants that the module defines."""
    imported = importlib.import_module(module)
    if hasattr(imported, "__all__"):
        return set(imported.__all__)
    found = set()
    for node in ast.parse(inspect.getsource(imported)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if target.id.isupper()}
    return {name for name in found if not name.startswith("_")}


def public_members(owner):
    """Methods and properties of a class, that it defines or a base of it in this package."""
    found = {}
    ours = [base for base in inspect.getmro(owner) if base.__module__.startswith("gaba_jax")]
    for base in ours:
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else value
            defined = getattr(function, "__qualname__", None) == f"{base.__qualname__}.{name}"
            if defined and not name.startswith("_"):
                found[name] = value
    return found


def documented():
    """What the pages api*.md document: full names, and the modules that hold them."""
    names, modules = [], []
    for page in (text for name, text in PAGES.items() if name.startswith("api")):
        current = None
        entry = r"^\.\. (?:auto|py:)?(\w+):: ([\w.]+).*\n((?: .*\n|\n(?= ))*)"
        for kind, name, body in re.findall(entry, page, re.MULTILINE):
            if kind in ("module", "currentmodule"):
                current = name
                modules += [name] * (kind == "module")
                continue
            names.append(f"{current}.{name}")
            members = re.findall(r"^ +\.\. auto(?:method|property):: (\w+)", body, re.MULTILINE)
            if ":members:" in body:  # of those without a docstring it makes nothing
                found = public_members(getattr(importlib.import_module(current), name))
                members += [member for member, value in found.items() if inspect.getdoc(value)]
            names += [f"{current}.{name}.{member}" for member in members]
    return names, modules


def test_the_reference_is_complete():
    names, modules = documented()
    assert len(names) == len(set(names))
    assert sorted(modules) == sorted(public_modules())
    expected = set()
    for module in public_modules():
        for name in public_names(module):
            expected.add(f"{module}.{name}")
            found = getattr(importlib.import_module(module), name)
            if inspect.isclass(found):
                expected |= {f"{module}.{name}.{member}" for member in public_members(found)}
    without_entry = sorted(expected - {*names, *modules})
    assert without_entry == []
    not_public = sorted(set(names) - expected)
    assert not_public == []


def test_the_reference_is_more_than_a_few_names():
    """The two sides of the comparison are not empty."""
    assert len(documented()[0]) > 100
    assert {"gaba", "weighting"} <= public_names("gaba_jax")
    assert "TASKS" in public_names("gaba_jax.turbofan.config")
    assert {"table", "reasons"} <= set(public_members(gaba_jax.Diagnosis))
    assert set(public_members(gaba_jax.BalanceState)) == set()


def toctrees(page):
    """Entries of the toctrees of a page."""
    for block in re.findall(r"```{toctree}\n(.*?)```", page, re.DOTALL):
        for line in block.splitlines():
            if line and not line.startswith(":"):
                yield line.strip()


def test_every_page_is_reached():
    reached, todo = set(), ["index"]
    while todo:
        name = todo.pop()
        reached.add(name)
        entries = [entry for entry in toctrees(PAGES[f"{name}.md"]) if "*" not in entry]
        todo += [entry for entry in entries if entry not in reached]
    assert {f"{name}.md" for name in reached} == set(PAGES)


def slugs(page):
    """Anchors of the headings, as GitHub and MyST make them."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[name], flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = DOCS / (path or name)
        assert target.is_file(), link
        if anchor:
            assert anchor in slugs(target.read_text()), link


def test_includes_find_their_markers():
    included = 0
    for page in PAGES.values():
        for path, block in re.findall(r"```{include} (\S+)\n(.*?)```", page, re.DOTALL):
            text = (DOCS / path).read_text()
            start, end = re.findall(r"^:(?:start-after|end-before): \"?(.*?)\"?$", block, re.M)
            assert end in text.partition(start)[2], (start, end)
            included += 1
    assert included == 3


def test_pictures_of_three_panels_are_there():
    for path in CONF["PANELS"]:
        assert (DOCS / path).is_file()
        assert any(f"({path})" in page for page in PAGES.values())


def test_formulas_are_mended():
    pytest.importorskip("latex2mathml", reason="needs the extra docs")
    mathml = CONF["mathml"]
    space = '<mspace width="0.167em" />'
    assert f"<mi>log</mi>{space}<msub>" in mathml(r"\log w_i", "inline")
    assert f"<mi>x</mi>{space}<mi>log</mi>" in mathml(r"x \log w", "inline")
    assert "<mi>min</mi><mo" in mathml(r"\min(a, b)", "inline")
    assert f"<mi>arg</mi>{space}<msub><mi>max</mi>" in mathml(r"\arg\max_i a", "inline")
    assert '<mo form="prefix">' in mathml("[-1, 1]", "inline")
    assert "form" not in mathml("(a) - 1", "inline")
    with pytest.raises(ValueError, match="does not know"):
        mathml(r"\nosuchcommand x", "inline")


def test_names_in_tables_break_between_words():
    context = {"body": '<p>a_b</p><td><a href="a_b.html">a_b:c=0.5,d=true</a> e_</td>'}
    CONF["let_names_break"](None, "page", "page.html", context, None)
    name = "a_<wbr>b:<wbr>c=0.5,<wbr>d=<wbr>true"
    assert context["body"] == f'<p>a_b</p><td><a href="a_b.html">{name}</a> e_</td>'


def test_names_on_the_page_of_the_rules_have_entries():
    """That the links to them resolve is the build's to say."""
    page = re.sub(r"```.*?```", "", PAGES["weightings.md"], flags=re.DOTALL)
    named = {CONF["entry"](code) for code in re.findall(r"`([^`\n]+)`", page)} - {None}
    around = {"average_norms", "hold_after", "normalized", "rescaled", "stabilize"}
    wanted = {f"gaba_jax.weighting.{name}" for name in {*rules(), "constant"} | around}
    assert wanted | {"gaba_jax.per_task", "gaba_jax.by_group", "gaba_jax.grad_drop"} <= named
    assert named <= set(documented()[0])


@pytest.mark.parametrize(
    ("page", "code", "target"),
    [
        ("weightings", "gaba", "gaba_jax.weighting.gaba"),
        ("weightings", "normalized(upgrad(K))", "gaba_jax.weighting.normalized"),
        ("weightings", "per_task(tx, K)", "gaba_jax.per_task"),
        ("weightings", "every=10", None),
        ("index", "gaba", None),
    ],
)
def test_names_on_the_page_of_the_rules_are_links(page, code, target):
    pytest.importorskip("sphinx", reason="needs the extra docs")
    from docutils import nodes, utils

    document = utils.new_document("page")
    document += nodes.paragraph("", "", nodes.literal(code, code))
    CONF["link_rules"](SimpleNamespace(env=SimpleNamespace(docname=page)), document)
    (literal,) = document.findall(nodes.literal)
    assert literal.astext() == code
    assert literal.parent.get("reftarget") == target


def modules_imported(path):
    """The modules and names of this package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_architecture_names_every_room_and_no_other():
    package = ROOT / "gaba_jax"
    page = PAGES["architecture.md"]
    rooms = re.findall(r"^\| `([\w./]+)` \|", page, re.MULTILINE)
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert sorted(rooms) == sorted({path.name for path in package.glob("*.py")} | folders)
    named = set(re.findall(r"\b(\w+\.py)\b", page))
    assert named <= {path.name for path in package.rglob("*.py")}


def test_what_the_architecture_says_of_imports():
    package = ROOT / "gaba_jax"
    imported = {path.stem: modules_imported(path) for path in package.glob("*.py")}
    assert "gaba_jax._transform" not in imported["_balanced"]
    assert "gaba_jax._balanced" not in imported["_transform"]
    beside = PAGES["architecture.md"].partition("**Beside the update.**")[2]
    beside = {f"gaba_jax.{name}" for name in re.findall(r"^\| `(\w+)(?:\.py|/)`", beside, re.M)}
    assert len(beside) > 5
    drivers = {"_transform", "_balanced", "_value_and_grad", "_aggregators", "_per_task", "linen"}
    reached, todo = set(), drivers | {"_accumulate"}
    while todo:
        name = todo.pop()
        reached.add(name)
        assert not imported[name] & beside, name
        ours = {full.removeprefix("gaba_jax.") for full in imported[name]}
        todo |= (ours & set(imported)) - reached
    assert {"_cut", "_products", "_state"} <= reached


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.py")), ids=lambda path: path.stem)
def test_notebooks_link_pages(path):
    """By addresses that work in Colab too; conf.py makes them links within the documentation."""
    links = re.findall(r"\]\((\S*/docs/\S*)\)", path.read_text())
    assert len(links) == {"quickstart": 2, "turbofan": 1}.get(path.stem, 0)
    for link in links:
        assert link.startswith(CONF["PAGES"])
        assert link.removeprefix(CONF["PAGES"]) in PAGES


def test_measured_tables():
    for name, parts in docs_pages.tables().items():
        for start, table in parts.items():
            assert start + table + docs_pages.END in PAGES[name]


def test_what_is_said_of_the_measurements():
    exported = performance.read("lowering")["exported"]
    calls = [calls for paths in exported.values() for on in paths.values() for calls in on.values()]
    assert calls
    assert not any(calls)
    cases = performance.read("cancellation")["results"]
    assert len(cases) > 10
    assert all(case["exact"] <= max(1e-4, 3 * case["direct"]) for case in cases.values())
    assert max(case["cancellation"] for case in cases.values()) > 9e4
    for compiled in performance.read("lowering")["compiled"].values():
        for layout in docs_pages.LAYOUTS:
            assert compiled[layout]["exact"]["bytes"] <= compiled[layout]["stacked"]["bytes"]
    large = performance.read("overhead")["results"]["mlp"]["8"]
    for what in ("time", "memory"):
        assert large["exact"][what] < large["stacked"][what]


def test_what_is_said_of_large_models():
    """The stored counts are those of the shapes, and the leaf is the narrower side there."""
    stored, shapes = performance.read("large_models"), large_models.Shapes()
    assert stored["results"] == large_models.count(shapes)
    assert stored["widest"]["factor / leaf"] == shapes.tokens() / shapes.width > 1
    operations = {path: row["operations"] for path, row in stored["results"].items()}
    last, every = operations["exact, on the last block"], operations["exact, every=10"]
    assert last < every < operations["exact, or stacked"] / 2
    assert "6.7 B parameters on 256 chips with K = 3" in PAGES["choose_a_path.md"]
    assert 6.7e9 <= stored["parameters"] < 6.8e9


@pytest.mark.parametrize("name", ["choose_a_path.md", "which_rule.md"])
def test_pages_to_choose_by_are_one_screen(name):
    assert len(PAGES[name].splitlines()) <= 80


def test_the_choice_of_a_rule_has_no_table_and_opens_the_landing_page():
    assert "|---" not in PAGES["which_rule.md"]
    assert PAGES["index.md"].index("{include} which_rule.md") < PAGES["index.md"].index(
        "## Install"
    )
    assert "{include}" not in PAGES["which_rule.md"]


PEERS = ("LibMTL", "lightning")  # whose listings are not run


@pytest.fixture(scope="module")
def sides():
    """The names after each section of docs/migrate.md that lists PyTorch, both sides having run."""
    pytest.importorskip("torchjd")
    pytest.importorskip("quadprog")  # its solver
    names, after = {}, {}
    for section in re.split(r"^##+ ", PAGES["migrate.md"], flags=re.MULTILINE):
        code = [
            block
            for block in pages.blocks(section)
            if not any(f"from {peer} import" in block for peer in PEERS)
        ]
        theirs = [block for block in code if block.startswith("import torch")]
        # Ours first: a listing of theirs may be given what ours made.
        with contextlib.redirect_stdout(io.StringIO()):
            for block in [*(block for block in code if block not in theirs), *theirs]:
                exec(block, names)
        if theirs:
            after[section.partition("\n")[0]] = dict(names)
    return after


def test_published_loss_beside_ours(sides):
    names = sides["`GABALoss`"]
    weights = names["optax"].tree.get(names["opt_state"], "task_weights")
    np.testing.assert_allclose(names["criterion"].weights, weights, rtol=1e-4)
    for key, value in names["ours"].items():
        np.testing.assert_allclose(names["params"][key].detach(), value, rtol=1e-4, atol=1e-5)


def test_aggregator_of_torchjd_beside_ours(sides):
    names = sides["An aggregator"]
    np.testing.assert_allclose(names["weights"], names["state"].task_weights, rtol=1e-3)
    for key, value in names["updates"].items():
        np.testing.assert_allclose(names["params"][key].grad, value, rtol=1e-3, atol=1e-3)


def test_engine_of_torchjd_beside_ours(sides):
    names = sides["The engine"]
    gramian = names["gramian"].numpy()
    np.testing.assert_allclose(names["our_gramian"], gramian, atol=1e-5 * gramian.max())
    of_trunk, of_head = (p.grad.numpy() for p in names["model"].parameters())
    ours = names["of_examples"]
    np.testing.assert_allclose(ours["trunk"], of_trunk.T, atol=1e-3 * np.abs(of_trunk).max())
    np.testing.assert_allclose(ours["health_head"], of_head[0], atol=1e-3 * np.abs(of_head).max())


def test_groups_of_torchjd_beside_ours(sides):
    names = sides["Groups of parameters"]
    for key in ("trunk", "second"):
        theirs = names["layers"][key].grad.numpy()
        np.testing.assert_allclose(names["by_layer"][key], theirs, atol=1e-3 * np.abs(theirs).max())


def test_pcd_and_krum_of_torchjd_beside_ours(sides):
    names = sides["PCD and Krum"]
    weights = names["pcd_state"].task_weights
    assert weights[1] > 0  # the constraint binds
    np.testing.assert_allclose(names["of_pcd"], weights, rtol=1e-3)
    np.testing.assert_allclose(names["of_krum"], names["nearest"], rtol=1e-6)


def test_recurrent_network_of_torchjd_beside_ours(sides):
    names = sides["A recurrent network"]
    theirs = [names["rnn"].weight_ih_l0.grad.numpy().T, names["rnn"].weight_hh_l0.grad.numpy().T]
    ours = names["through_time"]
    for mine, other in zip((ours["in"], ours["state"]), theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-3 * np.abs(other).max())
