"""Configs that notice what is misspelt: a key nobody reads, or an argument nobody takes, is an error."""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxmed.core.errors import UserError


class Config(Mapping):
    """A read-only view of nested dicts, by item and by attribute, that remembers which leaves were read."""

    def __init__(self, values: Mapping[str, Any], path: str = "config"):
        self._path = path
        self._values = {k: Config(v, f"{path}.{k}") if isinstance(v, Mapping) else v for k, v in values.items()}
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise KeyError(key)
        self._read.add(key)
        return self._values[key]

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            raise AttributeError(key)
        try:
            return self[key]
        except KeyError:
            raise UserError(f"{self._path}.{key} is missing" + did_you_mean(key, self._values)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Config({self._path}: {self._values})"

    def at_least(self, least: float, key: str, default: Any = None) -> Any:
        """The number at `key`.

        Raises:
          UserError: it is smaller than `least`, or no number.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            raise UserError(f"{self._path}.{key}={value!r}: give a number of at least {least}")
        return value

    def to_dict(self) -> dict[str, Any]:
        """A plain copy; everything in it counts as read."""
        self._read.update(self._values)
        return {k: v.to_dict() if isinstance(v, Config) else v for k, v in self._values.items()}

    def unread(self) -> list[str]:
        """Dotted names of the leaves that nobody has read."""
        names = []
        for k, v in self._values.items():
            if isinstance(v, Config) and (k in self._read or not v._values):
                names += v.unread()
            elif k not in self._read:
                names.append(f"{self._path}.{k}")
        return names


def did_you_mean(key: str, known) -> str:
    close = difflib.get_close_matches(key, [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def call(fn: Callable, section: Config, /, *args, skip: tuple[str, ...] = (), **extra):
    """`fn(*args, **section, **extra)` without the keys `skip`, after checking that `fn` takes every key.

    Raises:
      UserError: names the config field that `fn` does not take, or the one that it needs and did not get.
    """
    values = {k: v for k, v in section.to_dict().items() if k not in skip}
    parameters = inspect.signature(fn).parameters.values()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for key in values:
        if key not in names and not open_ended:
            known = [n for n in names if n not in extra]
            raise UserError(
                f"{section._path}.{key} is not an option here{did_you_mean(key, known)} (options: {', '.join(known)})"
            )
    try:
        inspect.signature(fn).bind(*args, **{**values, **extra})
    except TypeError as e:
        raise UserError(f"{section._path}: {e}") from None
    return fn(*args, **{**values, **extra})
