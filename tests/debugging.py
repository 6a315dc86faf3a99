"""JAX's debugging modes, as contexts by name."""

import contextlib

import jax


@contextlib.contextmanager
def runtime_checks():
    with jax.debug_nans(True), jax.enable_checks(True):
        yield


MODES = {
    "runtime_checks": runtime_checks,
    "leaks": jax.checking_leaks,
    "strict_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
}
