"""FLOPs of a function by counting: every matrix product and convolution in its program, loops times their length."""

import math

import jax
import numpy as np


def count(fn, *args, **kwargs) -> float:
    """2 x multiply-adds of all matrix products and convolutions of `fn` on arguments of these shapes.

    Traces `fn` and runs nothing; the arguments may be `ShapeDtypeStruct`s. Pallas kernels count what they declare,
    cuDNN attention its two matrix products. Element-wise work is not counted. Of a branch, the larger side.
    """
    return _count(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)


def _count(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * np.prod(kernel) / out_features
        elif name == "pallas_call":
            declared = eqn.params.get("cost_estimate")
            total += declared.flops if declared is not None else 0.0
        elif name.startswith("dot_product_attention_fwd"):
            (b, n, a, k), m = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
            total += 4.0 * b * n * m * a * k
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            times = eqn.params["length"] if name == "scan" else 1
            total += times * sum(_count(inner) for inner in _inner(eqn.params))
    return float(total)


def _inner(params):
    for value in params.values():
        value = getattr(value, "jaxpr", value)
        if hasattr(value, "eqns"):
            yield value
