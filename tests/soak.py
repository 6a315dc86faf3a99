"""Whether long runs are wanted: GABA_JAX_SOAK=1."""

import os

SOAK = os.environ.get("GABA_JAX_SOAK") == "1"
