"""Turbofan engines: the home application of gaba_jax.

One model reads a window of sensor data and does two tasks at once: it predicts the remaining
useful life (RUL) of an engine and classifies its health. On the shared backbone the first task
pulls hundreds of times harder than the second, which is what gradient balancing is for.

This package is an extra, ``pip install -e ".[turbofan]"`` in a checkout. The core never imports it.
Its modules are imported by name:

* :mod:`gaba_jax.turbofan.data`: NASA C-MAPSS files, read, normalised and cut into windows.
* :mod:`gaba_jax.turbofan.ncmapss`: NASA N-CMAPSS files (HDF5), streamed and cut into windows.
* :mod:`gaba_jax.turbofan.simulator`: a fleet of run-to-failure engines in the same format.
* :mod:`gaba_jax.turbofan.model`: the compact network, and the published one of 3.5 million.
* :mod:`gaba_jax.turbofan.losses`: the two losses, for a training step in JAX.
* :mod:`gaba_jax.turbofan.metrics`: the measures that the field reports, in numpy.
* :mod:`gaba_jax.turbofan.config`: what a run is, each value with its default.
* :mod:`gaba_jax.turbofan.train`: a run, and several seeds of one side by side.
* :mod:`gaba_jax.turbofan.evaluation`: scores of a trained model, and the summary of a run.
* :mod:`gaba_jax.turbofan.checkpoints`: runs that are saved and go on bitwise.
* :mod:`gaba_jax.turbofan.compare`, :mod:`gaba_jax.turbofan.report`: many methods, and what they
  show.

Examples:
    >>> from gaba_jax.turbofan import data, simulator
    >>> engines = data.prepare(simulator.simulate(num_train=5, num_test=2))
    >>> engines.test.windows.shape
    (2, 30, 17)
"""
