"""Where the public data is, and programs that are compiled quickly, for the tests that need it."""

import os
from pathlib import Path

import jax
import pytest


@pytest.fixture(scope="session")
def cmapss() -> Path:
    """The folder with the four C-MAPSS subsets; skips the test where there is none."""
    beside_repository = Path(__file__).resolve().parents[3] / "shared"
    folder = Path(os.environ.get("GABA_JAX_SHARED") or beside_repository) / "data" / "cmapss"
    if not folder.is_dir():
        reason = (
            f"needs the C-MAPSS files in {folder}; set GABA_JAX_SHARED to the folder above data"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="module")
def compiled_quickly():
    """Compiles in less than half the time: for large programs that run but a few updates."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
