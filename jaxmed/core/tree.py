"""Parameters as `{"a/b/c": leaf}`, and regex rules over those paths: the first match wins."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmed.core.errors import UserError


def path_str(path) -> str:
    """A jax key path as "a/b/0"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree) -> dict[str, Any]:
    """A pytree as `{"a/b/c": leaf}`, in the pytree's own order."""
    return {path_str(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested dict whose `flatten` is `flat`."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map_with_path(fn, tree, *rest):
    """`fn("a/b/c", leaf, ...)` over every leaf."""
    return jax.tree_util.tree_map_with_path(lambda p, *xs: fn(path_str(p), *xs), tree, *rest)


def first_match(rules: Iterable[tuple[str, Any]], name: str, default: Any = None) -> Any:
    """The value of the first rule whose regex is found (`re.search`) in `name`."""
    for pattern, value in rules:
        if re.search(pattern, name):
            return value
    return default


def check_rules(patterns: Sequence[str], names: Iterable[str], field: str) -> None:
    """Every pattern must match something, or it is a typing error.

    Raises:
      UserError: a regex of config field `field` is invalid or matches no parameter.
    """
    names = list(names)
    for pattern in patterns:
        try:
            found = any(re.search(pattern, n) for n in names)
        except re.error as e:
            raise UserError(f"{field}: {pattern!r} is not a regular expression ({e})") from None
        if not found:
            raise UserError(f"{field}: {pattern!r} matches no parameter; names look like {', '.join(names[:4])}, ...")


def num_params(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def params_sha256(tree) -> str:
    """A hash of names, shapes, dtypes and exact values, the same for any mesh and any process."""
    digest = hashlib.sha256()
    for name, x in sorted(flatten(tree).items()):
        x = np.asarray(x)
        digest.update(f"{name} {x.shape} {x.dtype}\n".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
