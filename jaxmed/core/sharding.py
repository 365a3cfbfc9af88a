"""The mesh, and what lives where on it: parameters by rules on their names, activations through `constrain`.

Axes of the mesh: `data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits widths and
heads; `seq` is for the tokens of one study. The mesh is always of type Auto (global view): plain linen does not
survive the Explicit type that `jax.make_mesh` would choose.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmed.core import tree
from jaxmed.core.errors import UserError

AXES = ("data", "fsdp", "tensor", "seq")
BATCH_AXES = ("data", "fsdp")
# What the axes of an activation mean, and the mesh axes that split them.
LOGICAL = {"batch": BATCH_AXES, "heads": ("tensor",), "mlp": ("tensor",), "tokens": ("seq",), "embed": ()}


def make_mesh(sizes: dict[str, int] | None = None, devices=None) -> Mesh:
    """A mesh with the axes `AXES`; a size of -1 (at most one, by default `data`) takes the devices that remain.

    Raises:
      UserError: an axis is unknown or the sizes do not multiply to the number of devices.
    """
    sizes = dict(sizes or {})
    devices = jax.devices() if devices is None else list(devices)
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise UserError(f"mesh: unknown axis {sorted(unknown)[0]!r}; the axes are {', '.join(AXES)}")
    shape = [int(sizes.get(a, -1 if a == "data" else 1)) for a in AXES]
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise UserError(f"mesh: sizes must be positive and at most one may be -1, got {dict(zip(AXES, shape))}")
    fixed = math.prod(n for n in shape if n != -1)
    if len(devices) % fixed or (-1 not in shape and fixed != len(devices)):
        raise UserError(
            f"mesh: {dict(zip(AXES, shape))} does not fit {len(devices)} devices; "
            f"the sizes must multiply to {len(devices)} (-1 takes what remains)"
        )
    shape = tuple(len(devices) // fixed if n == -1 else n for n in shape)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_size_multiple(mesh: Mesh) -> int:
    """Every global batch is split over this many groups of devices."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def constrain(x, *names: str | None):
    """Says how an activation is laid out: one logical name (see `LOGICAL`) or None for each axis.

    Without a mesh (`jax.set_mesh`), and for axes that a mesh axis does not divide, it does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = []
    for size, name in zip(x.shape, names, strict=True):
        axes = tuple(a for a in LOGICAL[name] if mesh.shape.get(a, 1) > 1) if name else ()
        spec.append(axes if axes and size % math.prod(mesh.shape[a] for a in axes) == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*spec))


def infer(params, rules, mesh: Mesh):
    """The sharding of every parameter.

    Args:
      params: pytree of arrays or `ShapeDtypeStruct`s.
      rules: pairs (regex on the path, rule), first match wins. Rules: "replicate"; "fsdp" splits the largest axis
        that divides over `fsdp`; "tensor:k" splits axis k over `tensor` (and the largest other one over `fsdp`).
      mesh: from `make_mesh`.

    Returns:
      The same tree with `NamedSharding`s. Every parameter must be covered.

    Raises:
      UserError: a parameter that no rule covers, or a rule that is not one.
    """

    def one(name, x):
        rule = tree.first_match(rules, name)
        if rule is None:
            raise UserError(f"sharding: no rule covers parameter {name!r}; end the rules with ('.*', 'replicate')")
        spec: list[Any] = [None] * len(x.shape)
        kind, _, axis = str(rule).partition(":")
        if kind not in ("replicate", "fsdp", "tensor"):
            raise UserError(f"sharding: unknown rule {rule!r} for {name!r}; use replicate, fsdp or tensor:<axis>")
        if kind == "tensor":
            k = int(axis or -1) % max(len(x.shape), 1)
            if x.shape and x.shape[k] % mesh.shape["tensor"] == 0 and mesh.shape["tensor"] > 1:
                spec[k] = "tensor"
        if kind != "replicate" and mesh.shape["fsdp"] > 1:
            free = [i for i, n in enumerate(x.shape) if spec[i] is None and n % mesh.shape["fsdp"] == 0]
            if free and np.prod(x.shape) >= 2**10:
                spec[max(free, key=lambda i: x.shape[i])] = "fsdp"
        return NamedSharding(mesh, P(*spec))

    return tree.map_with_path(one, params)


def infer_like(state, params, param_shardings, mesh: Mesh):
    """Shardings for optimiser state, EMA and the like: a leaf whose path ends in a parameter's path and has its shape
    is split as that parameter is; every other leaf is replicated."""
    known = {name: (x.shape, s) for (name, x), s in zip(tree.flatten(params).items(), jax.tree.leaves(param_shardings))}

    def one(name, x):
        parts = name.split("/")
        for i in range(len(parts)):
            shape, sharding = known.get("/".join(parts[i:]), (None, None))
            if shape == x.shape:
                return sharding
        return replicated(mesh)

    return tree.map_with_path(one, state)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Global arrays from the rows that this process's devices hold (as `data.pipeline` reads them)."""
    sharding = batch_sharding(mesh)
    return {
        k: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:])) for k, x in batch.items()
    }


def gather(x):
    """Host copies of (possibly multi-process) global arrays, whole, as numpy."""

    def one(a):
        if isinstance(a, jax.Array) and not a.is_fully_addressable:
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(a, tiled=True))
        return np.asarray(a)

    return jax.tree.map(one, x)
