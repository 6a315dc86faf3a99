"""The code on every page of docs/ runs, and prints what the page says."""

from pathlib import Path

import pytest

from tests import pages
from tests.slow import rest_slow

DOCS = Path(__file__).parent.parent / "docs"
WITH_CODE = [path for path in sorted(DOCS.glob("*.md")) if pages.blocks(path.read_text())]
FAST = [path for path in WITH_CODE if path.stem != "use_it_with"]  # see test_use_it_with.py


@pytest.mark.parametrize("path", rest_slow(WITH_CODE, fast=FAST), ids=lambda path: path.stem)
def test_the_code_on_the_page(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pictures are saved
    pages.run(path)
    assert (tmp_path / "balance.png").exists() == (path.stem == "tutorial")


def test_nothing_is_left_as_a_session():
    """Code can be copied as it stands: without prompts, and without output among it."""
    for path in DOCS.glob("*.md"):
        assert ">>>" not in path.read_text(), path


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```python\nprint(1)\n```\n\n```output\n2\n```\n", "the page says"),
        ("```python\nprint(1)\n```\n", "not on the page"),
        ("```python\nprint(1)\n```\n\n```python\nprint(2)\n```\n", "not on the page"),
        ("```python\nassert 1 > 2, 'no'\n```\n", "no"),
    ],
)
def test_a_page_that_is_wrong_is_found(page, message, tmp_path):
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(AssertionError, match=message):
        pages.run(tmp_path / "page.md")


def test_blocks_share_names_and_some_are_skipped(tmp_path):
    page = "```python\na = 2\n```\n\n<!-- skip: next -->\n\n```python\nimport nowhere\n```\n\n"
    page += "```python\nprint(a,  3)\n```\n\n```output\n2 3\n```\n"
    (tmp_path / "page.md").write_text(page)
    assert pages.run(tmp_path / "page.md")["a"] == 2
