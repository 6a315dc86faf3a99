"""Gradient norms of single examples, from one backward pass."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from gaba_jax._checks import check_params
from gaba_jax._slices import Sliced, slices_of
from gaba_jax._statistics import Reads, combine_cosines, combine_norms, measure


def example_norms(
    loss_fn: Callable[..., Any], params: Any, *batch: Any, in_axes: Any = 0, cosines: bool = False
) -> Any:
    r"""Norms of the gradients of single examples, and the cosines between them.

    .. math:: n_i = \left\| \nabla_\theta \ell(\theta, x_i) \right\|_2, \qquad
        c_{ij} = \frac{\langle \nabla \ell_i, \nabla \ell_j \rangle}{n_i n_j}

    One forward and one backward pass serve all N examples. Of a dense layer no gradient is formed:
    norms follow from its inputs and from the cotangents of its outputs (Goodfellow 2015), block by
    block. What does not end in such a product, such as a convolution or a leaf of a scan, is formed
    per example.

    Use it to rank, filter or clip examples. With a residual in place of the loss,
    ``sum(norms**2)`` is the trace of the neural tangent kernel of the N residuals.

    Args:
      loss_fn: ``loss_fn(params, *example)`` returns the scalar loss of one example.
      params: the parameters, a pytree of floating-point arrays.
      *batch: arrays (or pytrees of them) that hold the examples.
      in_axes: the axis of the examples in each of ``batch``, as in :func:`jax.vmap`; default 0.
      cosines: whether to return the cosines too, default False.

    Returns:
      [N] float32 norms; with ``cosines``, those and [N, N] float32 cosines (diagonal 1; 0 where a
      norm is 0).

    Raises:
      ValueError: parameters that are not floating-point, ``in_axes`` that do not fit ``batch``, a
        loss that is no scalar.

    References:
      Goodfellow, "Efficient Per-Example Gradient Computations", 2015, arXiv:1510.01799: the norm of
      a dense layer's gradient for one row. Here an example may have several rows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gaba_jax import example_norms
      >>> def loss_fn(params, x, y):
      ...     return (x @ params["w"] - y) ** 2
      >>> params = {"w": jnp.array([1.0, 0.0])}
      >>> x, y = jnp.array([[3.0, 4.0], [0.0, 2.0]]), jnp.array([2.0, 1.0])
      >>> example_norms(loss_fn, params, x, y)  # 2 * |error| * |x|
      Array([10.,  4.], dtype=float32)
    """
    check_params(params)
    slices = slices_of(in_axes, batch)
    _, _, leaves = Sliced(loss_fn, None, False, slices, batch, {}).backward(params, cosines)
    every = (True,) * len(leaves)
    measurement = measure(leaves, every, slices.number, Reads(cosines=cosines))
    norms = combine_norms(measurement.norms, jnp.array(every))
    if not cosines:
        return norms
    return norms, combine_cosines(measurement, jnp.array(every), norms)
