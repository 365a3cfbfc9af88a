"""Published tensor names and ours, both ways, as a table of rules. numpy only."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """One kind of tensor: a template of its published name, of our path, and the two changes of layout.

    "{i}" in both names is the number of a block. `old` are published names that mean the same.
    """

    published: str
    path: str
    to_ours: Callable[[np.ndarray], np.ndarray] = np.asarray
    to_published: Callable[[np.ndarray], np.ndarray] = np.asarray
    old: tuple[str, ...] = ()


def linear(published: str, path: str, bias: bool = True) -> list[Rule]:
    """(out, in) -> (in, out)."""
    rules = [Rule(f"{published}.weight", f"{path}/kernel", np.transpose, np.transpose)]
    return rules + ([Rule(f"{published}.bias", f"{path}/bias")] if bias else [])


def norm(published: str, path: str) -> list[Rule]:
    return [Rule(f"{published}.weight", f"{path}/scale"), Rule(f"{published}.bias", f"{path}/bias")]


class Names(NamedTuple):
    """What became of the published names: ours by theirs, and those that have no place in the model."""

    matched: dict[str, str]
    ignored: list[str]
    unknown: list[str]


# Prefixes that wrappers of training put before every name, and that others put anywhere in it.
WRAPPERS = ("module.", "_orig_mod.", "model.")
INSERTED = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def unwrap(name: str) -> str:
    """The name without what wrappers of training put into it."""
    for inserted in INSERTED:
        name = name.replace(inserted, "")
    while name.startswith(WRAPPERS):
        name = name[len(next(w for w in WRAPPERS if name.startswith(w))) :]
    return name


class Table:
    """Both directions of a list of rules."""

    def __init__(self, rules: Sequence[Rule]):
        self._by_published = {n: r for r in rules for n in (r.published, *r.old)}
        self._by_path = {r.path: r for r in rules}

    def to_ours(self, name: str, x: np.ndarray) -> tuple[str, np.ndarray] | None:
        """Our path and layout of a published tensor; None: no rule for this name."""
        found = _find(name, self._by_published)
        return None if found is None else (found[0].path.replace("{i}", found[1]), found[0].to_ours(np.asarray(x)))

    def to_published(self, path: str, x: np.ndarray) -> tuple[str, np.ndarray] | None:
        """The published name and layout of one of our parameters, "a/b/c"; None: no rule for this path."""
        found = _find(path, self._by_path)
        if found is None:
            return None
        return found[0].published.replace("{i}", found[1]), found[0].to_published(np.asarray(x))


def _find(name: str, templates: Mapping[str, Rule]) -> tuple[Rule, str] | None:
    """The rule of a name and the block's number in it (or "")."""
    if name in templates:
        return templates[name], ""
    for found in re.finditer(r"\d+", name):
        rule = templates.get(name[: found.start()] + "{i}" + name[found.end() :])
        if rule is not None:
            return rule, found.group()
    return None
