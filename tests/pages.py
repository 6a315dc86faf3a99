"""The code on a page of docs/ as it stands there: a reader's program, block after block.

A block ``python`` is run, in the names that those before it made. What it prints stands in a block
``output`` after it, in which numbers of blanks do not count and ``...`` stands for anything. A
comment ``<!-- skip: next -->`` leaves out the block after it.
"""

import contextlib
import doctest
import io
import re
from pathlib import Path

from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser, SkipParser

_FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


class _Printed:
    """Runs the blocks of one page, and holds what was printed against what the page says."""

    def __init__(self):
        self.run, self.unsaid = PythonEvaluator(), ""

    def python(self, example):
        self.all_said(example)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.run(example)
        self.unsaid = printed.getvalue()

    def output(self, example):
        expected, printed = str(example.parsed), self.unsaid
        self.unsaid = ""
        if not doctest.OutputChecker().check_output(expected, printed, _FLAGS):
            raise AssertionError(
                f"{example.path}, line {example.line}: the page says\n{expected}\nand this is "
                f"printed:\n{printed}"
            )

    def all_said(self, where):
        if self.unsaid:
            line = f", before line {where.line}" if hasattr(where, "line") else ", at its end"
            raise AssertionError(
                f"{where.path}{line}: printed, but not on the page:\n{self.unsaid}"
            )


def run(path):
    """Runs all blocks of a page, and returns the names that they made."""
    printed = _Printed()
    parsers = [
        CodeBlockParser("python", printed.python),
        CodeBlockParser("output", printed.output),
        SkipParser(),
    ]
    document = Sybil(parsers).parse(Path(path))
    document.namespace["__name__"] = "__main__"
    for example in document.examples():
        example.evaluate()
    printed.all_said(document)
    return document.namespace


def blocks(text, language="python"):
    """The blocks of one language in a text, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
