"""One of each kind is fast: what else a test runs on is slow."""

import pytest


def rest_slow(values, fast):
    """Values of one parameter, of which those that are not in ``fast`` are slow."""
    return [each if each in fast else pytest.param(each, marks=pytest.mark.slow) for each in values]


def rest_slow_of_several(rows, fast):
    """Rows of several parameters, likewise."""
    return [row if row in fast else pytest.param(*row, marks=pytest.mark.slow) for row in rows]
