"""One of each kind is fast: what else a test runs on is slow."""

import pytest


def rest_slow(values, fast):
    """Parameters of a test, of which those that are not in ``fast`` are slow."""
    return [each if each in fast else pytest.param(each, marks=pytest.mark.slow) for each in values]
